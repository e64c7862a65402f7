"""Counting what became of seeds, to choose by and to read."""

from __future__ import annotations

import math

import numpy as np
import pytest

from esper_ray.errors import ConfigError, CorruptError
from esper_ray.grafting import StrategyOutcome, StrategyOutcomes

LINEAR, MOMENTUM = 0, 2


def ids(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(numbers, np.int32)


def counted() -> StrategyOutcomes:
    outcomes = StrategyOutcomes().count_planted(ids(MOMENTUM, LINEAR, MOMENTUM, MOMENTUM))
    delta = np.array([0.1, 0.2, math.nan, -0.4])
    outcomes = outcomes.count_evaluated(ids(MOMENTUM, MOMENTUM, MOMENTUM, LINEAR), delta)
    outcomes = outcomes.count_ended(ids(LINEAR), "culled").count_ended(ids(MOMENTUM), "fossilized")
    return outcomes.count_ended(ids(MOMENTUM, MOMENTUM), "rolled_back")


def test_plantings_evaluations_and_endings_are_counted_by_strategy() -> None:
    outcomes = counted()
    assert outcomes["linear"] == StrategyOutcome(1, 1, -0.4, culled=1)
    assert outcomes["momentum"] == StrategyOutcome(3, 2, 0.1 + 0.2, fossilized=1, rolled_back=2)
    assert outcomes["adaptive"] == StrategyOutcome()


def test_counting_leaves_the_old_value_alone() -> None:
    before = StrategyOutcomes().count_planted(ids(LINEAR))
    before.count_planted(ids(LINEAR))
    assert before["linear"].planted == 1


def test_counting_nothing_changes_nothing() -> None:
    outcomes = counted()
    assert outcomes.count_planted(ids()) == outcomes
    assert outcomes.count_evaluated(ids(LINEAR), np.array([math.inf])) == outcomes


def test_a_number_without_a_strategy_is_refused() -> None:
    with pytest.raises(ConfigError, match="numbered 99"):
        StrategyOutcomes().count_planted(ids(99))


def test_the_mean_of_no_evaluations_is_zero() -> None:
    assert StrategyOutcome(planted=3).mean_delta == 0.0
    assert StrategyOutcome(evaluated=4, delta_sum=1.0).mean_delta == 0.25


def test_a_try_is_a_planting_or_an_evaluation_after_a_switch() -> None:
    assert StrategyOutcome(planted=3, evaluated=1).tries == 3
    assert StrategyOutcome(planted=1, evaluated=2).tries == 2


def test_json_keeps_every_bit_and_is_the_same_for_the_same_counts() -> None:
    outcomes = counted()
    text = outcomes.to_json()
    assert "0.30000000000000004" in text
    assert StrategyOutcomes.from_json(text) == outcomes
    assert StrategyOutcomes.from_json(text).to_json() == text
    assert StrategyOutcomes.from_json(StrategyOutcomes().to_json()) == StrategyOutcomes()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"linear": 3}',
        '{"linear": {"planted": 1}}',
        counted().to_json().replace('"culled": 1', '"culled": 1.5'),
        counted().to_json().replace('"culled": 1', '"culled": -1'),
        counted().to_json().replace("-0.4", "NaN"),
    ],
)
def test_other_text_is_corrupt(text: str) -> None:
    with pytest.raises(CorruptError, match="stored strategy outcomes cannot be read"):
        StrategyOutcomes.from_json(text)


def test_a_person_can_read_the_table() -> None:
    outcomes = counted().count_planted(ids(1))
    assert outcomes.rows()[1] == ("linear", 1, 1, -0.4, 0, 1, 0)
    assert outcomes.text().splitlines() == [
        "strategy          planted evaluated mean delta fossilized culled rolled back",
        "drift_controlled        1         0          -          0      0           0",
        "linear                  1         1    -0.4000          0      1           0",
        "momentum                3         2    +0.1500          1      0           2",
    ]
