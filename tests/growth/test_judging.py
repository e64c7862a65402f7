"""Counterfactuals: whose alpha is flipped, and which sign the answer has."""

from __future__ import annotations

import math

import numpy as np
import pytest

from esper_ray.events import Evaluation
from esper_ray.growth.judging import (
    Seed,
    counterfactual_requests,
    measurements,
    metrics_batch,
    stability,
)
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.policy import Measurement
from tests.builders import telemetry

LAYERS = {
    "a": telemetry([S.DORMANT, S.TRAINING, S.EVALUATING], layer_id="a"),
    "b": telemetry(
        [S.GRAFTING, S.FOSSILIZED],
        layer_id="b",
        alpha=np.array([0.3, 1.0], dtype=np.float32),
    ),
}


def evaluation(loss: list[float], change_low: list[float], change_high: list[float]) -> Evaluation:
    values = np.array(loss)
    return Evaluation(
        loss=values,
        accuracy=np.zeros(len(loss)),
        change=values - values[0],
        change_low=np.array(change_low),
        change_high=np.array(change_high),
        samples=10,
    )


def test_setting_zero_is_the_model_as_it_is_and_each_other_flips_one_seed() -> None:
    seeds: list[Seed] = [("a", 1), ("a", 2), ("b", 0)]
    [(group, request)] = counterfactual_requests(LAYERS, seeds, first_number=7)
    assert group == seeds
    assert (request.number, request.split, request.settings) == (7, "gate", 4)
    before_a, before_b = [0.0, 0.0, 1.0], [np.float32(0.3), 1.0]
    assert request.alphas["a"].tolist() == [before_a, [0, 1, 1], [0, 0, 0], before_a]
    assert request.alphas["b"].tolist() == [before_b, before_b, before_b, [0, 1]]
    assert request.alphas["a"].dtype == np.float32


def test_requests_change_no_telemetry() -> None:
    before = LAYERS["a"].alpha.copy()
    list(counterfactual_requests(LAYERS, [("a", 1)], 1))
    assert LAYERS["a"].alpha.tolist() == before.tolist()


def test_many_seeds_are_asked_for_in_several_numbered_requests() -> None:
    many = {"a": telemetry([S.TRAINING] * 70, layer_id="a")}
    seeds: list[Seed] = [("a", i) for i in range(70)]
    made = list(counterfactual_requests(many, seeds, first_number=5))
    assert [len(group) for group, _ in made] == [31, 31, 8]
    assert [seed for group, _ in made for seed in group] == seeds
    assert [request.number for _, request in made] == [5, 6, 7]
    for group, request in made:
        assert request.settings == len(group) + 1 == len(request.alphas["a"])
        flipped = request.alphas["a"][1:].argmax(1).tolist()
        assert [("a", i) for i in flipped] == group


def test_without_seeds_only_the_baseline_is_asked_for() -> None:
    [(group, request)] = counterfactual_requests(LAYERS, [], first_number=3)
    assert (group, request.settings, dict(request.alphas)) == ([], 1, {})


def test_a_blended_seed_helps_by_what_the_loss_rises_without_it() -> None:
    result = evaluation([2.0, 2.5], [0.0, 0.3], [0.0, 0.7])
    found = measurements(LAYERS, [("a", 2)], result)["a", 2]
    assert (found.loss_on, found.loss_off) == (2.0, 2.5)
    assert found.delta == pytest.approx(0.5 / 2.5)
    assert found.delta_low == pytest.approx(0.3 / 2.5)


def test_a_hidden_seed_helps_by_what_the_loss_falls_with_it() -> None:
    result = evaluation([2.0, 1.5], [0.0, -0.7], [0.0, -0.3])
    found = measurements(LAYERS, [("a", 1)], result)["a", 1]
    assert (found.loss_on, found.loss_off) == (1.5, 2.0)
    assert found.delta == pytest.approx(0.5 / 2.0)
    assert found.delta_low == pytest.approx(0.3 / 2.0)


def test_harm_is_negative_for_seeds_that_are_on_and_off() -> None:
    result = evaluation([2.0, 1.5, 2.5], [0.0, -0.7, 0.3], [0.0, -0.3, 0.7])
    found = measurements(LAYERS, [("b", 0), ("a", 1)], result)
    assert found["b", 0].delta == pytest.approx(-0.5 / 1.5)  # on: the loss falls without it
    assert found["b", 0].delta_low == pytest.approx(-0.7 / 1.5)
    assert found["a", 1].delta == pytest.approx(-0.5 / 2.0)  # off: the loss rises with it
    assert found["a", 1].delta_low == pytest.approx(-0.7 / 2.0)


def test_lesson_26_a_loss_of_zero_gives_no_delta() -> None:
    found = measurements(LAYERS, [("a", 1)], evaluation([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]))
    assert math.isnan(found["a", 1].delta)
    assert math.isnan(found["a", 1].delta_low)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2.0] * 4, None),
        ([2.0] * 5, 1.0),
        ([9.0, 2.0, 2.0, 2.0, 2.0, 2.0], 1.0),
        ([1.0, 1.0, 1.0, 1.0, 2.0], 1 - 0.4 / 1.2),
        ([-1.0, -1.0, -1.0, -1.0, -2.0], 1 - 0.4 / 1.2),
        ([-100.0, 100.0, -100.0, 100.0, 1.0], 0.0),
        ([1.0, 1.0, math.nan, 1.0, 1.0], None),
        ([1.0, 1.0, math.inf, 1.0, 1.0], None),
        ([0.0] * 5, None),
    ],
)
def test_stability_is_one_minus_the_spread_of_five_losses(
    losses: list[float], expected: float | None
) -> None:
    found = stability(losses)
    assert found is expected if expected is None else found == pytest.approx(expected)


def test_measured_seeds_become_rows_of_metrics() -> None:
    measured = {
        2: Measurement(loss_on=1.5, loss_off=2.0, delta=0.25, delta_low=0.2),
        0: Measurement(loss_on=3.0, loss_off=2.0, delta=-0.5, delta_low=-0.6),
    }
    batch = metrics_batch(LAYERS["a"], measured, accuracy=0.75, steadiness=None)
    assert batch.layer_id == "a"
    assert batch.seed_ids.tolist() == [0, 2]
    assert batch.metrics.tolist() == [[3.0, 0.75, 0.0, 0.0], [1.5, 0.75, 0.0, 1.0]]
    assert batch.valid.tolist() == [0b1011, 0b1011]
    assert batch.score.tolist() == [-0.5, 0.25]


def test_lesson_26_an_unmeasured_loss_leaves_its_bits_clear() -> None:
    lost = Measurement(loss_on=math.nan, loss_off=math.nan, delta=math.nan, delta_low=math.nan)
    batch = metrics_batch(LAYERS["a"], {1: lost}, accuracy=None, steadiness=0.5)
    assert batch.valid.tolist()[0] & 0b0111 == 0b0100
    assert math.isnan(batch.score[0])
