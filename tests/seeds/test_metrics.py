"""Metrics and scores in the seeds' rows: unmeasured is not zero, no row is half new."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.lifecycle import Refusal
from esper_ray.seeds import ExtendedStateTensor
from tests.builders import metrics, walk

SCORES = [
    (0.65, 650),
    (-0.65, -650),
    (0.0005, 1),
    (-0.0005, -1),
    (0.00049, 0),
    (-0.00049, 0),
    (0.0625, 63),
    (-0.0625, -63),
    (0.0, 0),
    (-0.0, 0),
    (1.2344, 1234),
    (3e38, 2**31 - 1),
    (-3e38, -(2**31)),
]


@pytest.mark.parametrize(("score", "stored"), SCORES)
def test_scores_are_rounded_half_away_from_zero_and_saturate(score: float, stored: int) -> None:
    state = ExtendedStateTensor(2)
    state.record(metrics([1], score=[score]))
    assert state.state_tensor[:, state.EVALUATION_SCORE].tolist() == [0, stored]


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_a_number_leaves_the_old_one(score: float) -> None:
    state = ExtendedStateTensor(1)
    state.record(metrics([0], score=[0.25]))
    reason = state.record(metrics([0], score=[score]))
    assert reason.tolist() == [Refusal.NONE if math.isnan(score) else Refusal.NOT_FINITE]
    assert int(state.columns[state.EVALUATION_SCORE]) == 250


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_with_a_metric_that_is_no_number_changes_nothing_and_the_others_are_stored(
    value: float,
) -> None:
    state = ExtendedStateTensor(3)
    given = metrics([0, 1], [[1, value, 3, 4], [1, value, 3, 4]], valid=[15, 13], score=[1, 1])
    assert state.record(given).tolist() == [Refusal.NOT_FINITE, Refusal.NONE]
    assert state.performance_metrics.tolist() == [[0, 0, 0, 0], [1, 0, 3, 4], [0, 0, 0, 0]]
    assert state.metrics_valid.tolist() == [0, 13, 0]
    assert state.columns[state.EVALUATION_SCORE].tolist() == [0, 1000, 0]


def test_lesson_21_metrics_of_a_repeated_id_are_refused_and_the_others_stored() -> None:
    state = ExtendedStateTensor(4)
    reason = state.record(metrics([1, 0, 1], [[1, 1, 1, 1]] * 3, valid=[15] * 3))
    assert reason.tolist() == [Refusal.DUPLICATE_SEED, Refusal.NONE, Refusal.DUPLICATE_SEED]
    assert state.metrics_valid.tolist() == [15, 0, 0, 0]


def test_lesson_26_an_unmeasured_metric_is_not_stored_as_zero() -> None:
    state = ExtendedStateTensor(3)
    state.record(metrics([2, 0], [[1, 2, 3, 4], [5, 6, 7, 8]], valid=[0b0101, 0b1111]))
    state.record(metrics([2], [[9, 9, 9, 9]], valid=[0b0010]))
    assert state.performance_metrics.tolist() == [[5, 6, 7, 8], [0, 0, 0, 0], [1, 9, 3, 0]]
    assert state.metrics_valid.tolist() == [0b1111, 0, 0b0111]


def test_grafting_remembers_the_scores_of_its_seeds_and_the_variances_of_the_layer() -> None:
    state = ExtendedStateTensor(3)
    walk(state, [0, 2], S.GRAFTING)
    given = metrics([1, 2], score=[0.25, 0.5])
    state.record(replace(given, loss_variance=0.125, accuracy_variance=0.75))
    assert np.isnan(state.grafting["performance_delta"][0])
    assert state.grafting["performance_delta"][1] == 0.5
    assert state.grafting["loss_variance"].tolist() == [0.125, 0.125]
    assert state.grafting["accuracy_variance"].tolist() == [0.75, 0.75]
    state.record(given)
    assert state.grafting["loss_variance"].tolist() == [0.125, 0.125]
