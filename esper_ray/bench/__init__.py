"""Speed claims, each measured side by side in one run: the one door for them."""

from __future__ import annotations

import importlib
from typing import Any, Final

from esper_ray.bench.hardware import hardware
from esper_ray.bench.rows import Row, make_row, table
from esper_ray.errors import ConfigError

__all__ = ["BENCHES", "Row", "hardware", "make_row", "run_bench", "table"]

BENCHES: Final = ("layer", "state", "step")


def run_bench(name: str, **options: Any) -> dict[str, Any]:
    """Measure one claim: {bench, hardware, rows [{name, value, unit, target, met}]}.

    Options are those of the bench's `measure`; ConfigError for one that it does not have.
    """
    if name not in BENCHES:
        raise ConfigError(f"no bench is named {name!r}", f"choose one of: {', '.join(BENCHES)}")
    measure = importlib.import_module(f"esper_ray.bench.{name}").measure
    unknown = [n for n in options if n not in measure.__annotations__]
    if unknown:
        raise ConfigError(f"bench {name!r} takes no {unknown[0]}", "leave it out")
    return {"bench": name, "hardware": hardware(), "rows": measure(**options)}
