"""Batched alpha schedules against the Phase 2 document's scalar ones, copied as the oracle."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from esper_ray.errors import ConfigError
from esper_ray.grafting import (
    DriftControlledGrafting,
    GraftingColumns,
    GraftingSettings,
    GraftingStrategyBase,
    LinearGrafting,
    advance_alpha,
    strategy_id,
)
from esper_ray.grafting.strategies import STRATEGIES

LINEAR, DRIFT = 0, 1


class Phase2Linear:
    """min(1, t / T)."""

    def compute_alpha(self, epoch: int, total: int, metrics: Mapping[str, float]) -> float:
        del metrics
        return min(1.0, epoch / total)


class Phase2DriftControlled:
    """The document's class, line by line; only the non-finite metric is ours."""

    def __init__(self, drift_threshold: float = 0.01, pause_duration: int = 10) -> None:
        self.drift_threshold = drift_threshold
        self.pause_duration = pause_duration
        self.pause_counter = 0

    def compute_alpha(self, epoch: int, total: int, metrics: Mapping[str, float]) -> float:
        drift = metrics.get("weight_drift", 0.0)
        if drift > self.drift_threshold:
            self.pause_counter = self.pause_duration
        if self.pause_counter > 0:
            self.pause_counter -= 1
            return metrics.get("current_alpha", 0.0)
        if not math.isfinite(drift):
            return metrics.get("current_alpha", 0.0)
        return min(1.0, epoch / total)


Oracle = Phase2Linear | Phase2DriftControlled
drifts = st.sampled_from([0.0, 0.004, 0.00999, 0.01, 0.010001, 0.02, 5.0, math.nan, math.inf])
traces = st.lists(drifts, min_size=1, max_size=40)


def trace_of(rule: Oracle | GraftingStrategyBase, total: int, trace: list[float]) -> list[float]:
    """Alpha after each epoch, as a caller of the scalar face sees it."""
    alphas = [0.0]
    for epoch, drift in enumerate(trace, start=1):
        metrics = {"weight_drift": drift, "current_alpha": alphas[-1]}
        alphas.append(rule.compute_alpha(epoch, total, metrics))
    return alphas[1:]


@settings(max_examples=60, deadline=None)
@given(total=st.integers(1, 60), trace=traces)
def test_linear_grafting_is_the_documents(total: int, trace: list[float]) -> None:
    assert trace_of(LinearGrafting(), total, trace) == trace_of(Phase2Linear(), total, trace)


@settings(max_examples=60, deadline=None)
@given(total=st.integers(1, 60), trace=traces, pause=st.integers(0, 12))
@example(total=20, trace=[0.0, 0.02, *[0.0] * 12], pause=10)
def test_drift_controlled_grafting_is_the_documents(
    total: int, trace: list[float], pause: int
) -> None:
    ours = DriftControlledGrafting(GraftingSettings(pause_epochs=pause))
    oracle = Phase2DriftControlled(pause_duration=pause)
    assert trace_of(ours, total, trace) == trace_of(oracle, total, trace)


@settings(max_examples=40, deadline=None)
@given(
    total=st.integers(1, 40),
    table=st.integers(1, 5).flatmap(
        lambda seeds: st.lists(
            st.lists(drifts, min_size=seeds, max_size=seeds), min_size=1, max_size=25
        )
    ),
    chosen=st.lists(st.sampled_from([LINEAR, DRIFT]), min_size=5, max_size=5),
)
def test_all_seeds_at_once_is_each_seed_alone(
    total: int, table: list[list[float]], chosen: list[int]
) -> None:
    seeds = len(table[0])
    ours = GraftingSettings(ramp_epochs=total)
    strategy = torch.tensor(chosen[:seeds], dtype=torch.int32)
    shorts = torch.zeros(seeds, dtype=torch.int16)
    columns = GraftingColumns(torch.zeros(seeds, dtype=torch.float64), shorts, shorts)
    alphas = []
    for epoch, drift in enumerate(table, start=1):
        epochs = torch.full((seeds,), epoch, dtype=torch.int32)
        drift_now = torch.tensor(drift, dtype=torch.float64)
        columns = advance_alpha(strategy, epochs, drift_now, columns, ours)
        alphas.append(columns.alpha.tolist())
    for seed in range(seeds):
        alone = STRATEGIES[chosen[seed]](ours)
        trace = [row[seed] for row in table]
        assert [row[seed] for row in alphas] == trace_of(alone, total, trace)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(STRATEGIES),
    total=st.integers(1, 60),
    trace=st.lists(st.floats() | drifts, min_size=1, max_size=30),
)
def test_alpha_stays_within_zero_and_one_and_never_falls(
    kind: type[GraftingStrategyBase], total: int, trace: list[float]
) -> None:
    alphas = trace_of(kind(), total, trace)
    assert all(0.0 <= alpha <= 1.0 for alpha in alphas)
    assert alphas == sorted(alphas)


def test_a_pause_holds_ten_epochs_and_then_jumps() -> None:
    alphas = trace_of(DriftControlledGrafting(), 20, [0.0, 0.02, *[0.0] * 10])
    assert alphas == [0.05, *[0.05] * 10, 0.6]


def test_drift_during_a_pause_arms_it_anew_and_counts_once() -> None:
    rule = DriftControlledGrafting(GraftingSettings(pause_epochs=3))
    columns = GraftingColumns(
        torch.zeros(1), torch.zeros(1, dtype=torch.int16), torch.zeros(1, dtype=torch.int16)
    )
    held = []
    for epoch, drift in enumerate([0.02, 0.0, 0.02, 0.0, 0.0, 0.0, 0.02], start=1):
        columns = rule.advance(torch.tensor([epoch]), 10, torch.tensor([drift]), columns)
        held.append(float(columns.alpha))
    assert held == pytest.approx([0, 0, 0, 0, 0, 0.6, 0.6])
    assert columns.pauses.tolist() == [2]


def test_a_pause_of_no_epochs_holds_nothing_and_counts_nothing() -> None:
    rule = DriftControlledGrafting(GraftingSettings(pause_epochs=0))
    none = torch.zeros(1, dtype=torch.int16)
    start = GraftingColumns(torch.zeros(1), none, none)
    after = rule.advance(torch.tensor([5]), 10, torch.tensor([9.0]), start)
    assert [column.item() for column in after] == [0.5, 0, 0]


@pytest.mark.parametrize("drift", [math.nan, -math.inf])
def test_lesson_26_a_drift_that_is_not_a_number_holds_alpha(drift: float) -> None:
    alphas = trace_of(DriftControlledGrafting(), 10, [0.0, drift, drift, 0.0])
    assert alphas == [0.1, 0.1, 0.1, 0.4]


def test_lesson_25_strategies_leave_different_traces() -> None:
    trace = [0.0, 0.02, 0.0, 0.0]
    assert trace_of(LinearGrafting(), 10, trace) != trace_of(DriftControlledGrafting(), 10, trace)


def test_lesson_25_a_fresh_strategy_does_not_remember_a_pause() -> None:
    used = DriftControlledGrafting()
    used.compute_alpha(1, 10, {"weight_drift": 1.0})
    assert used.compute_alpha(2, 10, {}) == 0.0
    assert DriftControlledGrafting().compute_alpha(2, 10, {}) == 0.2


def test_an_unknown_strategy_number_holds_its_columns() -> None:
    columns = GraftingColumns(torch.tensor([0.25]), torch.tensor([3]), torch.tensor([1]))
    one = torch.ones(1)
    after = advance_alpha(torch.tensor([99]), one, one, columns, GraftingSettings())
    assert [column.tolist() for column in after] == [[0.25], [3], [1]]


@pytest.mark.parametrize("total", [0, -1])
@pytest.mark.parametrize("kind", STRATEGIES)
def test_a_ramp_without_epochs_is_refused(kind: type[GraftingStrategyBase], total: int) -> None:
    with pytest.raises(ValueError, match=f"total_epochs must be at least 1, got {total}"):
        kind().compute_alpha(1, total, {})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ramp_epochs", 0),
        ("ramp_epochs", -5),
        ("pause_epochs", -1),
        ("pause_epochs", 2**15),  # the pause column is int16
        ("drift_threshold", -0.1),
        ("drift_threshold", math.nan),
    ],
)
def test_impossible_settings_name_the_value(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} must .*{value}"):
        GraftingSettings(**{name: value})  # type: ignore[arg-type]


def test_strategies_are_found_by_name() -> None:
    assert {kind.name: strategy_id(kind.name) for kind in STRATEGIES} == {
        "linear": 0,
        "drift_controlled": 1,
    }


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'cubic'") as caught:
        strategy_id("cubic")
    assert caught.value.hint == "choose one of: linear, drift_controlled"
