"""Who chooses a strategy, by what, and how often it may change."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from esper_ray.events import GraftingSignals
from esper_ray.grafting import (
    GraftingMemory,
    GraftingSettings,
    SelectorSettings,
    StrategyOutcome,
    StrategyOutcomes,
    StrategySelector,
    advance_alpha,
)

LINEAR, DRIFT, MOMENTUM, ADAPTIVE, STABILITY = range(5)
NONE = StrategyOutcomes()
SEEDS = np.array([3, 14, 15, 92], np.int64)


def selector(**selection: Any) -> StrategySelector:
    return StrategySelector(
        GraftingSettings(ramp_epochs=10, selection=SelectorSettings(**selection))
    )


def test_new_seeds_are_drift_controlled_by_default() -> None:
    assigned = StrategySelector(GraftingSettings()).assign("fc1", SEEDS, NONE)
    assert assigned.tolist() == [DRIFT] * 4
    assert assigned.dtype == np.int32


@pytest.mark.parametrize("mode", ["fixed", "performance"])
def test_a_named_strategy_is_given_to_every_new_seed(mode: str) -> None:
    assert (
        selector(mode=mode, strategy="linear").assign("fc1", SEEDS, NONE).tolist() == [LINEAR] * 4
    )


@pytest.mark.parametrize("mode", ["fixed", "ab", "bandit"])
def test_no_seeds_get_no_strategies(mode: str) -> None:
    none = selector(mode=mode, arms=("linear",)).assign("fc1", SEEDS[:0], NONE)
    assert none.shape == (0,)
    assert none.dtype == np.int32


def test_ab_takes_the_arm_that_the_hash_names() -> None:
    arms = ("stability", "linear", "momentum")
    chosen = selector(mode="ab", arms=arms, experiment="trial").assign("fc1", SEEDS, NONE)
    numbers = {"stability": STABILITY, "linear": LINEAR, "momentum": MOMENTUM}
    for seed, number in zip(SEEDS.tolist(), chosen.tolist(), strict=True):
        digest = hashlib.sha256(f"trial:fc1:{seed}".encode()).hexdigest()
        assert number == numbers[arms[int(digest, 16) % 3]]


def test_ab_depends_on_experiment_layer_and_seed_only_and_is_even() -> None:
    many = np.arange(600, dtype=np.int64)
    arms = ("linear", "momentum")
    one = selector(mode="ab", arms=arms, experiment="x").assign("fc1", many, NONE)
    assert np.array_equal(
        one[::-1], selector(mode="ab", arms=arms, experiment="x").assign("fc1", many[::-1], NONE)
    )
    assert not np.array_equal(
        one, selector(mode="ab", arms=arms, experiment="y").assign("fc1", many, NONE)
    )
    assert not np.array_equal(
        one, selector(mode="ab", arms=arms, experiment="x").assign("fc2", many, NONE)
    )
    assert 240 < np.count_nonzero(one == LINEAR) < 360


BANDIT = selector(mode="bandit", arms=("stability", "linear", "momentum"))


def test_the_bandit_tries_every_arm_first_from_the_lowest_id() -> None:
    assert BANDIT.assign("fc1", SEEDS, NONE).tolist() == [LINEAR, MOMENTUM, STABILITY, LINEAR]
    tried = StrategyOutcomes({"linear": StrategyOutcome(planted=1)})
    assert BANDIT.assign("fc1", SEEDS[:2], tried).tolist() == [MOMENTUM, STABILITY]


def test_the_bandit_is_ucb1_counting_one_seed_after_the_other() -> None:
    outcomes = StrategyOutcomes(
        {
            "linear": StrategyOutcome(planted=20, evaluated=10, delta_sum=1.0),
            "momentum": StrategyOutcome(planted=4, evaluated=4, delta_sum=0.4),
            "stability": StrategyOutcome(planted=2, evaluated=8, delta_sum=3.2),
            "adaptive": StrategyOutcome(planted=999),  # no arm
        }
    )
    means, tries = (
        {LINEAR: 0.1, MOMENTUM: 0.1, STABILITY: 0.4},
        {LINEAR: 20, MOMENTUM: 4, STABILITY: 8},
    )
    expected = []
    for _ in range(30):
        total = sum(tries.values())
        bound = {arm: means[arm] + math.sqrt(2 * math.log(total) / tries[arm]) for arm in tries}
        best = max(bound, key=bound.__getitem__)
        tries[best] += 1
        expected.append(best)
    seeds = np.arange(30, dtype=np.int64)
    assert BANDIT.assign("fc1", seeds, outcomes).tolist() == expected
    assert set(expected) == {MOMENTUM, STABILITY}


def test_equal_arms_go_to_the_lowest_id() -> None:
    same = StrategyOutcome(planted=2, evaluated=2, delta_sum=0.5)
    outcomes = StrategyOutcomes(dict.fromkeys(("stability", "momentum", "linear"), same))
    assert BANDIT.assign("fc1", SEEDS, outcomes).tolist() == [LINEAR, MOMENTUM, STABILITY, LINEAR]


class Grafting:
    """Some seeds in GRAFTING under a selector in mode performance."""

    def __init__(self, seeds: int = 1, **selection: Any) -> None:
        self.selector = selector(mode="performance", strategy="linear", **selection)
        self.memory = GraftingMemory()
        self.memory.enter(np.arange(seeds))
        self.strategy: NDArray[np.int32] = np.zeros(seeds, np.int32)
        self.epoch = 0

    def step(self, drift: Any = 0.0, delta: Any = 0.0, gradient: Any = 0.0) -> list[int]:
        """Strategies after one more epoch; a number stands for every seed."""
        self.epoch += 1
        seeds = len(self.memory)
        full = [np.full(seeds, value, np.float64) for value in (drift, delta, 0.0, gradient, 0.0)]
        epochs = np.full(seeds, self.epoch, np.int32)
        signals = GraftingSignals(np.arange(seeds), *full)
        self.strategy = self.selector.switch(self.memory, self.strategy, epochs, signals)
        assert self.strategy.dtype == np.int32
        numbers: list[int] = self.strategy.tolist()
        return numbers


@pytest.mark.parametrize("mode", ["fixed", "ab", "bandit"])
def test_other_modes_switch_nothing(mode: str) -> None:
    grafting = Grafting()
    before = grafting.memory.arrays()
    grafting.selector = selector(mode=mode, arms=("linear",))
    strategy = grafting.strategy
    assert grafting.step(drift=1.0) == [LINEAR]
    assert grafting.strategy is strategy
    assert np.array_equal(grafting.memory["since_switch"], before["since_switch"])


def test_drift_switches_to_drift_controlled_at_once() -> None:
    grafting = Grafting(3)
    assert grafting.step(drift=[0.01, 0.011, math.nan]) == [LINEAR, DRIFT, LINEAR]
    assert grafting.memory["limited"].tolist() == [False, True, False]
    assert grafting.memory["since_switch"].tolist() == [32767, 0, 32767]


def test_three_epochs_of_gain_in_a_row_switch_to_momentum() -> None:
    grafting = Grafting(2)
    gains = [0.02, 0.02, 0.01, 0.02, math.nan, 0.02, 0.02, 0.02]
    seen = [grafting.step(delta=[gain, 0.0]) for gain in gains]
    assert seen == [[LINEAR, LINEAR]] * 7 + [[MOMENTUM, LINEAR]]
    assert grafting.memory["improving"].tolist() == [3, 0]


def test_a_failed_stability_check_switches_to_stability_at_the_fifth_epoch() -> None:
    grafting = Grafting(3)
    seen = [grafting.step(gradient=[10.0, 9.9, math.nan]) for _ in range(5)]
    assert seen == [[LINEAR] * 3] * 4 + [[STABILITY, LINEAR, LINEAR]]


def test_a_failed_check_goes_before_drift_and_drift_before_gain() -> None:
    grafting = Grafting(2, improving_epochs=5)
    for _ in range(4):
        grafting.step(delta=1.0)
    assert grafting.step(drift=1.0, delta=1.0, gradient=[99.0, 0.0]) == [STABILITY, DRIFT]


def test_at_most_one_switch_in_ten_epochs() -> None:
    grafting = Grafting()
    seen = [grafting.step(drift=1.0), *(grafting.step(delta=1.0) for _ in range(10))]
    assert seen == [[DRIFT]] * 10 + [[MOMENTUM]]


def test_staying_is_no_switch() -> None:
    grafting = Grafting(cooldown_epochs=0)
    grafting.step(drift=1.0)
    grafting.memory["pause"][:] = 7
    assert grafting.step(drift=1.0) == [DRIFT]
    assert grafting.memory["pause"].tolist() == [7]
    assert grafting.memory["since_switch"].tolist() == [1]


def test_a_switched_row_begins_afresh_and_keeps_what_was_measured() -> None:
    grafting = Grafting(2)
    for name in ("pause", "paused", "velocity", "ramp", "last", "bad"):
        grafting.memory[name][:] = 1
    grafting.memory.measured(np.arange(2), np.array([0.5, 0.5]))
    grafting.step(drift=[1.0, 0.0])
    for name in ("pause", "paused", "velocity", "ramp", "last", "bad"):
        assert grafting.memory[name].tolist() == [0, 1]
    assert grafting.memory["performance_delta"].tolist() == [0.5, 0.5]


def test_alpha_does_not_leap_after_a_switch() -> None:
    grafting = Grafting()
    alpha = np.array([0.2], np.float32)
    grafting.step(drift=1.0)
    signals = GraftingSignals(np.arange(1), *(np.zeros(1) for _ in range(5)))
    after = advance_alpha(
        grafting.memory,
        grafting.strategy,
        np.array([9], np.int32),
        alpha,
        signals,
        grafting.selector.settings,
    )
    assert after.tolist() == pytest.approx([0.4])


def test_streaks_and_waits_saturate() -> None:
    grafting = Grafting()
    grafting.memory["improving"][:] = 255
    grafting.step(delta=1.0)
    assert grafting.memory["improving"].tolist() == [255]
    grafting.memory["since_switch"][:] = 32766
    grafting.step(delta=1.0)
    grafting.step(delta=1.0)
    assert grafting.memory["since_switch"].tolist() == [32767]


def test_signals_of_other_seeds_are_refused() -> None:
    grafting = Grafting(2)
    signals = GraftingSignals(np.array([0, 7]), *(np.zeros(2) for _ in range(5)))
    epochs = np.ones(2, np.int32)
    with pytest.raises(ValueError, match="do not match"):
        grafting.selector.switch(grafting.memory, grafting.strategy, epochs, signals)
