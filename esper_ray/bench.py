"""Speed claims, each measured side by side in one run."""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from esper_ray.config import RunConfig, parse_config
from esper_ray.console import text_table
from esper_ray.errors import ConfigError
from esper_ray.runtime import Runtime

_EPOCHS = 12
_WARM_UP_EPOCHS = 2
STEP_RATIO_TARGET = 3.0
"""Two stages on the object store and two cores; pipelining cannot win on a model this small."""

Row = dict[str, Any]


def run_bench(name: str) -> dict[str, Any]:
    """Measure one claim: {bench, hardware, rows [{name, value, unit, target, met}]}."""
    if name not in BENCHES:
        raise ConfigError(f"no bench is named {name!r}", f"choose one of: {', '.join(BENCHES)}")
    return {"bench": name, "hardware": hardware(), "rows": BENCHES[name]()}


def hardware() -> str:
    """Processor, cores, Python and torch, in one line."""
    import torch

    cores = os.cpu_count()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{_processor()}, {cores} cores, {platform.system()}, {versions}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _step() -> list[Row]:
    """A training step through actors against the same step in one process, epochs interleaved."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Runtime(_step_config(f"{folder}/local"), local=True) as local,
        Runtime(_step_config(f"{folder}/actors")) as actors,
    ):
        times = _interleaved({"local": _clocked(local), "actors": _clocked(actors)})
    milliseconds = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    ratio = statistics.median(a / b for a, b in zip(times["actors"], times["local"], strict=True))
    return [
        _row("one process", milliseconds["local"], "ms/step"),
        _row("layer actors", milliseconds["actors"], "ms/step"),
        _row("actors / one process", ratio, "ratio", STEP_RATIO_TARGET),
    ]


def _row(name: str, value: float, unit: str, target: float | None = None) -> Row:
    met = target is None or value <= target
    return {"name": name, "value": round(value, 4), "unit": unit, "target": target, "met": met}


def _step_config(url: str) -> RunConfig:
    return parse_config(
        {
            "run": "bench-step",
            "train": {"epochs": _EPOCHS},
            "seeds": {"targets": ["*.hidden"], "epoch_steps": 25},
            "lifecycle": {"germinate_after": 0, "minimum_epochs": {"TRAINING": 100}},
            "storage": {"url": url, "every_epochs": _EPOCHS},
        }
    )


def _clocked(runtime: Runtime) -> Callable[[int], float]:
    """A function that trains epoch n and returns seconds per optimiser step."""
    runtime.open()
    steps = runtime.config.seeds.epoch_steps

    def train(epoch: int) -> float:
        began = time.perf_counter()
        runtime.train_epoch(epoch)
        return (time.perf_counter() - began) / steps

    return train


def _interleaved(clocks: Mapping[str, Callable[[int], float]]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in clocks}
    for epoch in range(_EPOCHS):
        for name, clock in clocks.items():
            seconds = clock(epoch)
            if epoch >= _WARM_UP_EPOCHS:
                times[name].append(seconds)
    return times


BENCHES: Mapping[str, Callable[[], list[Row]]] = {"step": _step}


def table(document: Mapping[str, Any]) -> str:
    """A bench document as text."""
    rows = [
        [
            row["name"],
            f"{row['value']:.3f}",
            row["unit"],
            "-" if row["target"] is None else f"<= {row['target']}",
            "yes" if row["met"] else "MISSED",
        ]
        for row in document["rows"]
    ]
    body = text_table(["row", "value", "unit", "target", "met"], rows)
    return f"bench {document['bench']} on {document['hardware']}\n{body}"
