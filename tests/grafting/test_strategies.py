"""The scalar rules against traces computed by hand from the design's formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from esper_ray.grafting import (
    STRATEGIES,
    AdaptiveGrafting,
    DriftControlledGrafting,
    GraftingSettings,
    GraftingStrategyBase,
    LinearGrafting,
    MomentumGrafting,
    StabilityGrafting,
)

Metrics = Mapping[str, float]
CALM = {"loss_variance": 0.0, "gradient_norm": 1.0, "accuracy_variance": 0.0}
WILD = CALM | {"gradient_norm": 10.0}


def trace(rule: GraftingStrategyBase, total: int, history: Sequence[Metrics]) -> list[float]:
    """Alpha after each epoch from 1 on, each fed back as the next current alpha."""
    alphas = [0.0]
    for epoch, metrics in enumerate(history, start=1):
        alphas.append(rule.compute_alpha(epoch, total, {**metrics, "current_alpha": alphas[-1]}))
    return alphas[1:]


def drifts(*values: float) -> list[Metrics]:
    return [{"weight_drift": value} for value in values]


def deltas(*values: float) -> list[Metrics]:
    return [{"performance_delta": value} for value in values]


class Phase2DriftControlled:
    """The document's class, line by line; only the hold on a non-finite metric is ours."""

    def __init__(self, drift_threshold: float = 0.01, pause_duration: int = 10) -> None:
        self.drift_threshold = drift_threshold
        self.pause_duration = pause_duration
        self.pause_counter = 0

    def compute_alpha(self, current_epoch: int, total_epochs: int, metrics: Metrics) -> float:
        drift = metrics.get("weight_drift", 0.0)
        if drift > self.drift_threshold:
            self.pause_counter = self.pause_duration
        if self.pause_counter > 0:
            self.pause_counter -= 1
            return metrics.get("current_alpha", 0.0)
        if not math.isfinite(drift):
            return metrics.get("current_alpha", 0.0)
        return min(1.0, current_epoch / total_epochs)


some_drift = st.sampled_from([0.0, 0.00999, 0.01, 0.010001, 5.0, math.nan, math.inf, -math.inf])


@settings(max_examples=60, deadline=None)
@given(
    total=st.integers(1, 60),
    values=st.lists(some_drift, min_size=1, max_size=40),
    pause=st.integers(0, 12),
)
@example(total=20, values=[0.0, 0.02, *[0.0] * 12], pause=10)
def test_drift_controlled_grafting_is_the_documents(
    total: int, values: list[float], pause: int
) -> None:
    oracle = Phase2DriftControlled(pause_duration=pause)
    rule = DriftControlledGrafting(GraftingSettings(pause_epochs=pause))
    alpha = 0.0
    for epoch, drift in enumerate(values, start=1):
        metrics = {"weight_drift": drift, "current_alpha": alpha}
        expected = oracle.compute_alpha(epoch, total, metrics)
        alpha = rule.compute_alpha(epoch, total, metrics)
        assert alpha == expected


def test_lesson_25_all_five_strategies_give_distinct_traces() -> None:
    history = [
        {"weight_drift": drift, "performance_delta": 0.05, **(WILD if epoch > 9 else CALM)}
        for epoch, drift in enumerate([0.0, 0.0, 0.006, 0.02, *[0.0] * 26], start=1)
    ]
    traces = {kind.name: tuple(trace(kind(), 20, history)) for kind in STRATEGIES.values()}
    assert len(traces) == len(set(traces.values())) == 5


def test_lesson_25_a_fresh_strategy_does_not_remember_a_pause() -> None:
    used = DriftControlledGrafting()
    used.compute_alpha(1, 10, {"weight_drift": 1.0})
    assert used.compute_alpha(2, 10, {}) == 0.0
    assert DriftControlledGrafting().compute_alpha(2, 10, {}) == 0.2


def test_linear_grafting_ends_at_exactly_one() -> None:
    assert trace(LinearGrafting(), 4, [{}] * 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_pause_holds_ten_epochs_and_then_jumps() -> None:
    alphas = trace(DriftControlledGrafting(), 20, drifts(0.0, 0.02, *[0.0] * 10))
    assert alphas == [0.05, *[0.05] * 10, 0.6]


def test_drift_during_a_pause_begins_it_anew() -> None:
    rule = DriftControlledGrafting(GraftingSettings(pause_epochs=3))
    alphas = trace(rule, 10, drifts(0.02, 0.0, 0.02, 0.0, 0.0, 0.0, 0.02))
    assert alphas == [0, 0, 0, 0, 0, 0.6, 0.6]


def test_resume_continue_takes_up_the_ramp_where_it_was_left() -> None:
    rule = DriftControlledGrafting(GraftingSettings(pause_epochs=2, resume="continue"))
    alphas = trace(rule, 10, drifts(0.0, 0.02, 0.0, 0.0, math.nan, 0.0))
    assert alphas == [0.1, 0.1, 0.1, 0.2, 0.2, 0.3]


def test_a_pause_of_no_epochs_holds_nothing() -> None:
    rule = DriftControlledGrafting(GraftingSettings(pause_epochs=0))
    assert trace(rule, 10, drifts(9.0, 9.0)) == [0.1, 0.2]


@pytest.mark.parametrize("drift", [math.nan, -math.inf])
def test_lesson_26_a_drift_that_is_not_a_number_holds_alpha(drift: float) -> None:
    alphas = trace(DriftControlledGrafting(), 10, drifts(0.0, drift, drift, 0.0))
    assert alphas == [0.1, 0.1, 0.1, 0.4]


def test_momentum_adds_a_velocity_and_may_fall() -> None:
    alphas = trace(MomentumGrafting(), 10, deltas(0.1, 0.0, -0.4, 0.0, 2.0))
    assert alphas == pytest.approx([0.2, 0.21, 0.0, 0.3601, 1.0])


@pytest.mark.parametrize("delta", [math.nan, math.inf, -math.inf])
def test_lesson_26_a_delta_that_is_not_a_number_holds_alpha_and_velocity(delta: float) -> None:
    alphas = trace(MomentumGrafting(), 10, deltas(0.1, delta, 0.0))
    assert alphas == pytest.approx([0.2, 0.2, 0.31])


def adaptive_history(*pairs: tuple[float, float]) -> list[Metrics]:
    return [{"weight_drift": drift, "performance_delta": delta} for drift, delta in pairs]


def test_adaptive_grafting_without_drift_or_gain_is_the_ramp() -> None:
    assert trace(AdaptiveGrafting(), 4, [{}] * 5) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_adaptive_grafting_pauses_under_drift_and_then_catches_up_by_two_over_t() -> None:
    rule = AdaptiveGrafting(GraftingSettings(pause_epochs=4))
    alphas = trace(rule, 10, adaptive_history((0, 0), (0.02, 0), *[(0, 0)] * 9))
    # Ti: 13, 17, 20, 20 in the four epochs of the pause (rounded up, at most 2 T).
    assert rule.ramp == 20
    assert alphas == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.1, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55])


def test_adaptive_grafting_stretches_its_ramp_under_slight_drift() -> None:
    rule = AdaptiveGrafting()
    # The drift branch follows t / T below rule 1's own threshold; alpha never falls after it.
    alphas = trace(rule, 10, adaptive_history((0.007, 0), (0.007, 0), (0, 0), (0, 0)))
    assert rule.ramp == 17
    assert alphas == pytest.approx([0.1, 0.2, 0.2, 4 / 17])


def test_adaptive_grafting_speeds_up_while_the_seed_helps() -> None:
    rule = AdaptiveGrafting()
    alphas = trace(rule, 10, adaptive_history((0, 0.05), (0, 0.5), *[(0, 0)] * 4, *[(0, 1)] * 9))
    # t / T + v, then clipped to 2 / T per epoch, then t / 8 with Ti 10 -> 9 -> 8.
    assert alphas[:6] == pytest.approx([0.15, 0.35, 0.375, 0.5, 0.625, 0.75])
    assert alphas[-1] == 1.0
    assert rule.ramp == 5


def test_adaptive_grafting_resumes_where_it_left_if_told_so() -> None:
    rule = AdaptiveGrafting(GraftingSettings(pause_epochs=1, resume="continue"))
    alphas = trace(rule, 10, adaptive_history((0, 0), (0.02, 0), (0, 0), (0, 0.02)))
    assert alphas == pytest.approx([0.1, 0.1, 2 / 13, 0.32])


@pytest.mark.parametrize("pair", [(math.nan, 0.5), (-math.inf, 0), (0, math.nan), (0, math.inf)])
def test_lesson_26_adaptive_grafting_holds_without_a_measure(pair: tuple[float, float]) -> None:
    rule = AdaptiveGrafting()
    assert trace(rule, 10, adaptive_history((0, 0), pair)) == [0.1, 0.1]
    assert rule.ramp == 0


def test_adaptive_grafting_holds_when_the_velocity_overflows() -> None:
    rule = AdaptiveGrafting(GraftingSettings(momentum_factor=1.0))
    assert trace(rule, 10, adaptive_history((0, 1e308), (0, 1e308))) == [0.2, 0.2]


def test_a_failed_check_halves_the_ramp_until_a_stable_one() -> None:
    history = [CALM] * 4 + [WILD] + [CALM] * 5
    alphas = trace(StabilityGrafting(), 20, history)
    ramp = [epoch / 20 for epoch in range(1, 11)]
    assert alphas == [*ramp[:4], *(alpha / 2 for alpha in ramp[4:9]), ramp[9]]


def test_three_failed_checks_go_back_to_the_last_stable_alpha_and_stay() -> None:
    rule = StabilityGrafting(GraftingSettings(check_every=2))
    alphas = trace(rule, 20, [CALM] * 3 + [WILD] * 9 + [CALM] * 2)
    # Stable at t = 2 with alpha 0.05; failed at 4, 6, 8, 10, 12; stable at 14.
    expected = [0.05, 0.1, 0.15, 0.1, 0.125, 0.15, 0.175, *[0.05] * 6, 0.7]
    assert alphas == pytest.approx(expected)
    assert (rule.last, rule.bad) == (0.05, 0)


@pytest.mark.parametrize("name", list(CALM))
@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_lesson_26_a_check_that_cannot_be_made_holds_alpha(name: str, value: float | None) -> None:
    unmeasured = {key: one for key, one in CALM.items() if key != name or value is not None}
    if value is not None:
        unmeasured[name] = value
    rule = StabilityGrafting()
    assert trace(rule, 10, [unmeasured] * 6) == [0.1, 0.2, 0.3, 0.4, 0.4, 0.6]
    assert rule.bad == 0


@pytest.mark.parametrize("name", list(CALM))
def test_each_limit_of_the_stability_check_is_exclusive(name: str) -> None:
    limits = {"loss_variance": 0.1, "gradient_norm": 10.0, "accuracy_variance": 0.05}
    rule = StabilityGrafting()
    below = CALM | {name: math.nextafter(limits[name], 0)}
    trace(rule, 10, [below] * 5)
    assert rule.bad == 0
    trace(rule, 10, [CALM | {name: limits[name]}] * 5)
    assert rule.bad == 1


@pytest.mark.parametrize("total", [0, -1])
@pytest.mark.parametrize("kind", STRATEGIES.values())
def test_a_ramp_without_epochs_is_refused(kind: type[GraftingStrategyBase], total: int) -> None:
    with pytest.raises(ValueError, match=f"total_epochs must be at least 1, got {total}"):
        kind().compute_alpha(1, total, {})


metric_names = ["weight_drift", "performance_delta", *CALM]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(list(STRATEGIES.values())),
    total=st.integers(1, 20),
    history=st.lists(
        st.dictionaries(st.sampled_from([*metric_names, "current_alpha"]), st.floats()),
        min_size=1,
        max_size=30,
    ),
)
def test_alpha_is_within_zero_and_one_whatever_is_measured(
    kind: type[GraftingStrategyBase], total: int, history: list[dict[str, float]]
) -> None:
    rule = kind()
    for epoch, metrics in enumerate(history):
        assert 0.0 <= rule.compute_alpha(epoch, total, metrics) <= 1.0
