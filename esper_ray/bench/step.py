"""`bench step`: a training step through actors against the same step in one process."""

from __future__ import annotations

import statistics
import tempfile

from esper_ray.bench.epochs import clocked, interleaved
from esper_ray.bench.rows import Row, make_row
from esper_ray.config import RunConfig, parse_config
from esper_ray.runtime import Runtime

_EPOCHS = 12
_WARM_UP_EPOCHS = 2
STEP_RATIO_TARGET = 3.0
"""Two stages on the object store and two cores; pipelining cannot win on a model this small."""


def measure() -> list[Row]:
    """Milliseconds of both and their ratio, epochs interleaved."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Runtime(_step_config(f"{folder}/local"), local=True) as local,
        Runtime(_step_config(f"{folder}/actors")) as actors,
    ):
        times = interleaved(
            {"local": clocked(local), "actors": clocked(actors)}, _EPOCHS, _WARM_UP_EPOCHS
        )
    milliseconds = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    ratio = statistics.median(a / b for a, b in zip(times["actors"], times["local"], strict=True))
    return [
        make_row("one process", milliseconds["local"], "ms/step"),
        make_row("layer actors", milliseconds["actors"], "ms/step"),
        make_row("actors / one process", ratio, "ratio", STEP_RATIO_TARGET),
    ]


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
