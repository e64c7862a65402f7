"""LifecycleManager: table first, then minimum epochs, then gates."""

from __future__ import annotations

from itertools import pairwise

import pytest

from esper_ray.lifecycle import TERMINAL_STATES, Cause, LifecycleManager, Refusal
from esper_ray.lifecycle import ExtendedLifecycle as S
from tests.builders import PATHS
from tests.lifecycle.rows import OPEN, Row, explained, judge, names_of, refusal_of, requests

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


@pytest.mark.parametrize(("source", "target", "least"), MINIMA)
def test_a_state_lasts_its_minimum(source: S, target: S, least: int) -> None:
    assert refusal_of(Row(source, target, least)) is Refusal.NONE
    early = Row(source, target, least - 1)
    assert refusal_of(early) is Refusal.TOO_EARLY
    assert explained(early) == (
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
    assert refusal_of(Row(source, target, 0, cause)) is Refusal.NONE


@pytest.mark.parametrize("cause", [Cause.POLICY, Cause.USER, Cause.TIMEOUT])
def test_culling_for_another_cause_waits_for_the_minimum(cause: Cause) -> None:
    assert refusal_of(Row(S.TRAINING, S.CULLED, 99, cause)) is Refusal.TOO_EARLY


def test_an_error_waives_no_minimum_on_the_way_forward() -> None:
    late = Row(S.STABILIZATION, S.EVALUATING, 19, Cause.ERROR)
    assert refusal_of(late) is Refusal.TOO_EARLY


def test_waiving_the_minimum_does_not_open_the_gate() -> None:
    unharmed = Row(S.EVALUATING, S.CULLED, 0, Cause.ERROR, 0, {**OPEN, "error_rate": 0.0})
    assert refusal_of(unharmed) is Refusal.GATE


def test_the_table_speaks_before_the_minimum_and_the_minimum_before_the_gate() -> None:
    shut = {**OPEN, "delta_ratio": 9.0}
    rows = [
        Row(S.TRAINING, S.FOSSILIZED, 0, metrics=shut),
        Row(S.TRAINING, S.GRAFTING, 3, metrics=shut),
        Row(S.TRAINING, S.GRAFTING, 100, metrics=shut),
    ]
    assert names_of(judge(*rows)) == ["NOT_IN_TABLE", "TOO_EARLY", "GATE"]
    assert [explained(row) for row in rows] == [
        "the move is not in the table",
        "TRAINING lasts at least 100 epochs, this seed has spent 3",
        "delta_ratio is 9, and <= 0.5 is needed",
    ]


@pytest.mark.parametrize("goal", list(S))
def test_lesson_16_every_state_is_reached_through_accepted_requests(goal: S) -> None:
    path = PATHS[goal]
    decided = judge(*(Row(source, target, 300) for source, target in pairwise(path)))
    assert decided.accepted.all()
    assert path[-1] is goal


@pytest.mark.parametrize("source", sorted(TERMINAL_STATES))
def test_lesson_19_nothing_leaves_a_terminal_state(source: S) -> None:
    rows = [Row(source, t, 10**6, cause) for t in S for cause in Cause if cause != Cause.REPLANT]
    assert set(names_of(judge(*rows))) == {"TERMINAL"}


def test_decisions_carry_their_requests_thresholds_and_minima() -> None:
    asked = requests([Row(S.DORMANT, S.GERMINATED, 0)])
    manager = LifecycleManager()
    decided = manager.judge(asked)
    assert decided.requests is asked
    assert decided.gates is manager.gates
    assert decided.minimum_epochs.tolist() == [0, 0, 100, 50, 20, 30, 50, 0, 0, 0, 0]


def test_judging_changes_nothing() -> None:
    rows = [Row(S.TRAINING, S.GRAFTING), Row(99, S.GRAFTING), Row(S.CULLED, S.DORMANT)]
    asked, same = requests(rows), requests(rows)
    manager = LifecycleManager(replanting=True)
    first, again = manager.judge(asked), manager.judge(asked)
    assert first.reason.tolist() == again.reason.tolist()
    for name in ("source", "target", "cause", "epochs_in_state", "error_count", "generation"):
        assert getattr(asked, name).tolist() == getattr(same, name).tolist()
    assert {n: v.tolist() for n, v in asked.metrics.items()} == {
        n: v.tolist() for n, v in same.metrics.items()
    }
