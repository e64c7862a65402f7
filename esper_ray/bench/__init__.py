"""Speed claims, each measured side by side in one run: the one door for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from esper_ray.bench import state, step
from esper_ray.bench.hardware import hardware
from esper_ray.bench.rows import Row, make_row, table
from esper_ray.errors import ConfigError

__all__ = ["BENCHES", "Row", "hardware", "make_row", "run_bench", "table"]

BENCHES: Mapping[str, Callable[[], list[Row]]] = {"step": step.measure, "state": state.measure}


def run_bench(name: str) -> dict[str, Any]:
    """Measure one claim: {bench, hardware, rows [{name, value, unit, target, met}]}."""
    if name not in BENCHES:
        raise ConfigError(f"no bench is named {name!r}", f"choose one of: {', '.join(BENCHES)}")
    return {"bench": name, "hardware": hardware(), "rows": BENCHES[name]()}
