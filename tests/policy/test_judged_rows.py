"""Whose counterfactual is due."""

from __future__ import annotations

import pytest

from esper_ray.grafting import STRATEGIES
from esper_ray.lifecycle import MINIMUM_EPOCHS
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.policy import PolicySettings, judged_rows
from tests.builders import telemetry
from tests.policy.reports import ints

READERS = {2: "momentum", 3: "adaptive"}


def test_seeds_old_enough_in_a_judged_state_are_measured() -> None:
    young = telemetry(list(S), [MINIMUM_EPOCHS.get(s, 0) - 1 for s in S])
    old = telemetry(list(S), [MINIMUM_EPOCHS.get(s, 0) for s in S])
    assert judged_rows(young, MINIMUM_EPOCHS, PolicySettings()).tolist() == []
    judged = [S.TRAINING, S.EVALUATING, S.FINE_TUNING]
    assert judged_rows(old, MINIMUM_EPOCHS, PolicySettings()).tolist() == judged


def test_a_state_without_a_minimum_is_measured_at_once() -> None:
    new = telemetry(list(S), 0)
    due = judged_rows(new, {S.EVALUATING: 1}, PolicySettings())
    assert due.tolist() == [S.TRAINING, S.FINE_TUNING]


def test_reconstruction_needs_no_counterfactual_in_training() -> None:
    old, settings = telemetry(list(S), 1_000), PolicySettings(objective="reconstruction")
    due = judged_rows(old, MINIMUM_EPOCHS, settings)
    assert due.tolist() == [S.EVALUATING, S.FINE_TUNING]


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_a_seed_in_grafting_is_measured_where_its_strategy_reads_the_gain(strategy: int) -> None:
    states = [S.GRAFTING, S.STABILIZATION, S.GERMINATED]
    seen = telemetry(states, 0, strategy=ints(strategy, strategy, strategy))
    due = judged_rows(seen, MINIMUM_EPOCHS, PolicySettings()).tolist()
    assert due == ([0] if STRATEGIES[strategy].name in READERS.values() else [])


def test_momentum_and_adaptive_are_the_strategies_that_read_the_gain() -> None:
    reads = {n: k.name for n, k in STRATEGIES.items() if "performance_delta" in k.reads}
    assert reads == READERS


def test_each_seed_counts_by_its_own_strategy() -> None:
    seen = telemetry([S.GRAFTING] * 5, 0, strategy=ints(0, 1, 2, 3, 4))
    assert judged_rows(seen, MINIMUM_EPOCHS, PolicySettings()).tolist() == [2, 3]


def test_all_seeds_in_grafting_are_measured_where_strategies_may_switch() -> None:
    seen = telemetry([S.GRAFTING, S.STABILIZATION, S.GRAFTING], 0)
    settings = PolicySettings(strategies_switch=True)
    assert judged_rows(seen, MINIMUM_EPOCHS, settings).tolist() == [0, 2]


def test_an_empty_layer_is_measured_nowhere() -> None:
    assert judged_rows(telemetry([]), MINIMUM_EPOCHS, PolicySettings()).tolist() == []
