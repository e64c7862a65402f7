"""Small runs that pass through the whole lifecycle in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from esper_ray.config import RunConfig, parse_config

ConfigMaker = Callable[..., RunConfig]


def short_run(url: Path, **changes: Any) -> dict[str, Any]:
    """A run file whose seeds go from DORMANT to FOSSILIZED in about 30 epochs of 4 steps."""
    values: dict[str, Any] = {
        "run": url.name.replace("_", "-"),  # one of this name at a time on a cluster
        "seed": 3,
        "data": {"name": "stdlib_text", "batch_size": 32, "evaluation_samples": 1024},
        "model": {"args": {"embedding": 8, "hidden": 32}},
        "train": {"epochs": 34, "lr": 4e-3},
        "seeds": {
            "targets": ["*.hidden"],
            "epoch_steps": 4,
            "blueprint": "bottleneck",
            "hidden": 16,
            "lr": 8e-3,
            "grafting": {"strategy": "linear", "ramp_epochs": 6},
        },
        "lifecycle": {
            "germinate_after": 2,
            "minimum_epochs": {
                "TRAINING": 3,
                "GRAFTING": 3,
                "STABILIZATION": 2,
                "EVALUATING": 2,
                "FINE_TUNING": 2,
            },
            "gates": {
                "performance_delta_min": -1.0,
                "stability_min": 0.0,
                "improvement_min": 0.0,
                "final_stability_min": 0.0,
            },
        },
        "storage": {"url": str(url), "every_epochs": 7},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        values.setdefault(section, {})[key] = value
    return values


@pytest.fixture
def make_config(tmp_path: Path) -> ConfigMaker:
    """Make a short run stored below `tmp_path`; keywords are section__key=value."""

    def make(name: str = "run", **changes: Any) -> RunConfig:
        return parse_config(short_run(tmp_path / name, **changes))

    return make


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """Write such a run file; returns its path."""

    def write(name: str, **changes: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(short_run(tmp_path / name, **changes)))
        return path

    return write
