"""What is known at an epoch boundary, and what layers are told to record of it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from esper_ray.actors.observation import Observation, moves_of
from esper_ray.actors.progress import Progress
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.policy import LayerReport, Measurement
from tests.builders import telemetry, transitions

GAIN = Measurement(1.0, 2.0, 0.5, 0.4)


def observed(
    states: dict[str, S], measured: dict[str, Measurement] | None = None, accuracy: float = 0.5
) -> Observation:
    layers = {
        name: LayerReport(
            telemetry([state], layer_id=name),
            0.9,
            {0: measured[name]} if measured and name in measured else {},
        )
        for name, state in states.items()
    }
    return Observation(3, 16, layers, accuracy)


def test_telemetry_is_that_of_the_reports() -> None:
    now = observed({"a": S.DORMANT, "b": S.TRAINING})
    assert list(now.telemetry) == ["a", "b"]
    assert all(now.telemetry[name] is report.telemetry for name, report in now.layers.items())


def test_metrics_go_to_layers_with_seeds_that_were_judged_or_are_in_grafting() -> None:
    states = {"a": S.DORMANT, "b": S.GRAFTING, "c": S.EVALUATING, "d": S.EVALUATING}
    batches = observed(states, {"c": GAIN}).metrics(Progress())
    assert [(b.layer_id, b.seed_ids.tolist()) for b in batches] == [("b", []), ("c", [0])]
    assert batches[1].metrics.tolist() == [pytest.approx([1.0, 0.5, 0.9, 2.0])]
    assert batches[1].score.tolist() == [0.5]


@pytest.mark.parametrize("epochs", [4, 5, 6])
def test_variances_are_told_as_soon_as_five_epochs_were_measured(epochs: int) -> None:
    progress = Progress()
    for epoch in range(epochs):
        progress.observe(float(epoch), epoch / 4)
    (batch,) = observed({"a": S.GRAFTING}).metrics(progress)
    told = (batch.loss_variance, batch.accuracy_variance)
    if epochs < 5:
        assert all(math.isnan(variance) for variance in told)
    else:
        assert told == (2.0, 2.0 / 16)


def test_accuracy_that_is_not_a_number_is_not_told_as_measured() -> None:
    (batch,) = observed({"a": S.EVALUATING}, {"a": GAIN}, accuracy=math.nan).metrics(Progress())
    assert batch.valid.tolist() == [0b1101]
    assert np.isfinite(batch.metrics).all()


def test_moves_are_told_with_the_names_of_the_states() -> None:
    batch = transitions([2, 0], [S.DORMANT, S.TRAINING], [S.GERMINATED, S.CULLED], layer_id="a")
    assert moves_of(batch) == [
        ("a", 2, "DORMANT", "GERMINATED"),
        ("a", 0, "TRAINING", "CULLED"),
    ]
