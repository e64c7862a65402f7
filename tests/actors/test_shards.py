"""Stages and layers spread over actors train as one process does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import product
from typing import Any

import numpy as np
import pytest

from esper_ray.events.messages import StageReport
from esper_ray.planning import RunPlan
from esper_ray.storage import Root
from tests.actors import grids

EPOCHS = 2


def differences(plan: RunPlan, told: Sequence[grids.Told], root: Root) -> dict[str, float]:
    """How far losses, gradients, seeds and telemetry are from those of one process."""
    expected = grids.reference(plan, root, EPOCHS)
    found: dict[str, list[float]] = {"losses": [], "gradients": [], "seeds": [], "telemetry": []}
    for shards, whole in zip(grids.by_stage(told), expected, strict=True):
        report = grids.whole_report(shards)
        found["losses"].append(grids.relative(report.losses, whole.report.losses))
        gradients = grids.whole_gradients(shards)
        assert gradients.keys() == whole.gradients.keys()
        for name, value in whole.gradients.items():
            found["gradients"].append(grids.relative(gradients[name], value))
        for layer_id, tensors in whole.grown.items():
            grown = grids.whole_grown(shards, layer_id)
            for name, value in tensors.items():
                found["seeds"].append(grids.relative(grown[name], value))
        found["telemetry"] += telemetry(report, whole.report)
    return {name: max(values) for name, values in found.items()}


def telemetry(found: StageReport, expected: StageReport) -> list[float]:
    """The same of everything that a report says of seeds."""
    pairs = []
    for one, other in zip(found.telemetry, expected.telemetry, strict=True):
        assert one.layer_id == other.layer_id
        assert one.parameter_share == other.parameter_share
        for part, whole in ((one, other), (one.signals, other.signals)):
            pairs += [
                grids.relative(getattr(part, field.name), getattr(whole, field.name))
                for field in fields(part)
                if isinstance(getattr(part, field.name), np.ndarray)
            ]
    return pairs


def case(transport: str, stages: int, shards: int, micro_batches: int) -> Any:
    """One of all combinations; a process for each actor takes seconds, so a few are enough here."""
    few = transport == "object_store" or (stages, shards, micro_batches) in SHORT
    marks = () if few else pytest.mark.soak
    return pytest.param(transport, stages, shards, micro_batches, marks=marks)


SHORT = {(1, 3, 1), (2, 1, 4), (2, 2, 4), (3, 2, 1), (3, 3, 4)}
CASES = product(("object_store", "torch_dist"), (1, 2, 3), (1, 2, 3), (1, 4))


@pytest.mark.parametrize(
    ("transport", "stages", "shards", "micro_batches"), [case(*each) for each in CASES]
)
def test_any_grid_trains_as_one_process_does(
    root: Root, transport: str, stages: int, shards: int, micro_batches: int
) -> None:
    plan = grids.plan_of(stages, shards, micro_batches)
    actors = grids.actors_of(plan, root, transport)
    try:
        told = grids.train(actors, EPOCHS)
    finally:
        for actor in actors:
            actor.close()
    far = differences(plan, told, root)
    assert far.pop("telemetry") < 1e-6  # it is float32, whatever the run is
    assert max(far.values()) < 1e-12, far
