"""Speed claims, each measured side by side in one run: the one door for them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from esper_ray.bench.hardware import hardware
from esper_ray.bench.rows import Row, make_row, table
from esper_ray.errors import ConfigError

__all__ = ["BENCHES", "Row", "hardware", "make_row", "run_bench", "table"]


def _measure(name: str) -> Callable[..., list[Row]]:
    """The bench of that name, whose module is loaded when it is called."""

    def measure(**options: Any) -> list[Row]:
        rows: list[Row] = importlib.import_module(f"esper_ray.bench.{name}").measure(**options)
        return rows

    return measure


BENCHES: Mapping[str, Callable[..., list[Row]]] = {
    name: _measure(name) for name in ("checkpoint", "layer", "pipeline", "state", "step")
}

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "checkpoint": ("url", "quick"),
    "layer": ("device", "quick"),
}


def run_bench(name: str, **options: Any) -> dict[str, Any]:
    """Measure one claim: {bench, hardware, rows [{name, value, unit, target, met}]}.

    `layer` takes device ("cpu" or "cuda") and quick, `checkpoint` url and quick; an option that a
    bench does not take is a ConfigError.
    """
    if name not in BENCHES:
        raise ConfigError(f"no bench is named {name!r}", f"choose one of: {', '.join(BENCHES)}")
    for option in options:
        if option not in OPTIONS.get(name, ()):
            raise ConfigError(f"bench {name!r} takes no {option}", "leave it out")
    return {"bench": name, "hardware": hardware(), "rows": BENCHES[name](**options)}
