"""LifecycleManager: table first, then minimum epochs, then gates."""

from __future__ import annotations

from itertools import pairwise

import pytest

from esper_ray.lifecycle import (
    MINIMUM_EPOCHS,
    TERMINAL_STATES,
    Cause,
    LifecycleManager,
    TransitionContext,
    TransitionRequest,
)
from esper_ray.lifecycle import ExtendedLifecycle as S
from tests.builders import PATHS

METRICS = {
    "local_loss": 0.1,
    "delta_ratio": 0.1,
    "alpha_one_loss_ratio": 1.0,
    "alpha": 1.0,
    "performance_delta": 0.1,
    "stability_score": 1.0,
    "total_improvement": 0.1,
    "final_stability": 1.0,
    "error_rate": 0.5,
}
MINIMA = [
    (S.TRAINING, S.GRAFTING, 100),
    (S.TRAINING, S.CULLED, 100),
    (S.GRAFTING, S.STABILIZATION, 50),
    (S.STABILIZATION, S.EVALUATING, 20),
    (S.EVALUATING, S.FINE_TUNING, 30),
    (S.EVALUATING, S.CULLED, 30),
    (S.FINE_TUNING, S.FOSSILIZED, 50),
    (S.FINE_TUNING, S.CULLED, 50),
]


def request(
    source: S, target: S, epochs: int, cause: Cause = Cause.POLICY, **metrics: float
) -> TransitionRequest:
    values = {**METRICS, **metrics}
    return TransitionRequest(TransitionContext(0, source, target, epochs, values), cause=cause)


def test_the_default_minima_are_those_of_the_semantics() -> None:
    assert dict(MINIMUM_EPOCHS) == {
        S.DORMANT: 0,
        S.GERMINATED: 0,
        S.TRAINING: 100,
        S.GRAFTING: 50,
        S.STABILIZATION: 20,
        S.EVALUATING: 30,
        S.FINE_TUNING: 50,
    }


@pytest.mark.parametrize(("source", "target", "least"), MINIMA)
def test_a_state_lasts_its_minimum(source: S, target: S, least: int) -> None:
    manager = LifecycleManager()
    assert manager.judge(request(source, target, least)).accepted
    early = manager.judge(request(source, target, least - 1))
    assert not early.accepted
    assert early.reason == (
        f"{source.name} lasts at least {least} epochs, this seed has spent {least - 1}"
    )


@pytest.mark.parametrize(
    ("source", "target", "cause"),
    [
        (S.GERMINATED, S.CANCELLED, Cause.USER),
        (S.TRAINING, S.CANCELLED, Cause.USER),
        (S.TRAINING, S.CULLED, Cause.ERROR),
        (S.GRAFTING, S.ROLLED_BACK, Cause.POLICY),
        (S.STABILIZATION, S.ROLLED_BACK, Cause.TIMEOUT),
        (S.EVALUATING, S.ROLLED_BACK, Cause.USER),
        (S.EVALUATING, S.CULLED, Cause.ERROR),
        (S.FINE_TUNING, S.ROLLED_BACK, Cause.ERROR),
        (S.FINE_TUNING, S.CULLED, Cause.ERROR),
    ],
)
def test_the_minimum_is_waived_for_cancelling_rolling_back_and_errors(
    source: S, target: S, cause: Cause
) -> None:
    assert LifecycleManager().judge(request(source, target, 0, cause)).accepted


@pytest.mark.parametrize("cause", [Cause.POLICY, Cause.USER, Cause.TIMEOUT])
def test_culling_for_another_cause_waits_for_the_minimum(cause: Cause) -> None:
    assert not LifecycleManager().judge(request(S.TRAINING, S.CULLED, 99, cause)).accepted


def test_an_error_waives_no_minimum_on_the_way_forward() -> None:
    late = request(S.STABILIZATION, S.EVALUATING, 19, Cause.ERROR)
    assert not LifecycleManager().judge(late).accepted


def test_waiving_the_minimum_does_not_open_the_gate() -> None:
    unharmed = request(S.EVALUATING, S.CULLED, 0, Cause.ERROR, error_rate=0.0)
    assert not LifecycleManager().judge(unharmed).accepted


def test_minima_are_settings() -> None:
    manager = LifecycleManager(minimum_epochs={S.TRAINING: 2})
    assert manager.judge(request(S.TRAINING, S.GRAFTING, 2)).accepted
    assert not manager.judge(request(S.TRAINING, S.GRAFTING, 1)).accepted
    assert manager.judge(request(S.GRAFTING, S.STABILIZATION, 0)).accepted


def test_the_table_speaks_before_the_minimum_and_the_minimum_before_the_gate() -> None:
    manager = LifecycleManager()
    illegal = manager.judge(request(S.TRAINING, S.FOSSILIZED, 0)).reason
    assert illegal == "Invalid transition: TRAINING -> FOSSILIZED"
    early = manager.judge(request(S.TRAINING, S.GRAFTING, 3, delta_ratio=9.0)).reason
    assert early == "TRAINING lasts at least 100 epochs, this seed has spent 3"
    shut = manager.judge(request(S.TRAINING, S.GRAFTING, 100, delta_ratio=9.0)).reason
    assert shut == "delta_ratio is 9, and <= 0.5 is needed"


@pytest.mark.parametrize("goal", list(S))
def test_lesson_16_every_state_is_reached_through_accepted_requests(goal: S) -> None:
    manager, path = LifecycleManager(), PATHS[goal]
    for source, target in pairwise(path):
        assert manager.judge(request(source, target, 300)).accepted
    assert path[-1] is goal


@pytest.mark.parametrize("source", sorted(TERMINAL_STATES))
def test_nothing_leaves_a_terminal_state(source: S) -> None:
    manager = LifecycleManager()
    assert not any(manager.judge(request(source, t, 1_000, Cause.ERROR)).accepted for t in S)


def test_a_decision_carries_its_request() -> None:
    asked = request(S.DORMANT, S.GERMINATED, 0)
    assert LifecycleManager().judge(asked).request is asked
