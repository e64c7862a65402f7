"""Terminal seeds may start anew where it is allowed; what a person asks is judged like the rest."""

from __future__ import annotations

import math
from typing import Any

import pytest

from esper_ray.errors import ConfigError
from esper_ray.lifecycle import (
    ACTIONS,
    LAST_GENERATION,
    MINIMUM_EPOCHS,
    TERMINAL_STATES,
    Budgets,
    Cause,
    LifecycleManager,
    Refusal,
    move_of,
)
from esper_ray.lifecycle import ExtendedLifecycle as S
from tests.lifecycle.oracle import verdict
from tests.lifecycle.rows import LIVE, OPEN, Row, explained, judge, names_of, refusal_of, requests

RENEWED = [S.CULLED, S.CANCELLED, S.ROLLED_BACK]
ON = LifecycleManager(replanting=True)
HELD = LifecycleManager(replanting=True, budgets=Budgets(embargo_epochs=10))


def anew(source: int, since: float | None = None, **given: Any) -> Row:
    metrics = OPEN if since is None else {"epochs_since_end": since}
    return Row(source, S.DORMANT, cause=Cause.REPLANT, metrics=metrics, **given)


@pytest.mark.parametrize("source", list(S))
def test_replanting_is_off_unless_allowed(source: S) -> None:
    assert refusal_of(anew(source)) is Refusal.REPLANTING_OFF


@pytest.mark.parametrize("source", list(S))
def test_only_terminal_seeds_other_than_fossilized_start_anew(source: S) -> None:
    expected = Refusal.NONE if source in RENEWED else Refusal.NOT_IN_TABLE
    assert refusal_of(anew(source, epochs=0), ON) is expected


@pytest.mark.parametrize("source", sorted(TERMINAL_STATES))
@pytest.mark.parametrize("cause", [c for c in Cause if c != Cause.REPLANT])
def test_becoming_dormant_for_another_cause_is_no_replanting(source: S, cause: Cause) -> None:
    assert refusal_of(Row(source, S.DORMANT, cause=cause), ON) is Refusal.TERMINAL


@pytest.mark.parametrize("target", [t for t in S if t != S.DORMANT])
def test_a_replanted_seed_becomes_dormant_and_nothing_else(target: S) -> None:
    assert refusal_of(Row(S.CULLED, target, cause=Cause.REPLANT), ON) is Refusal.TERMINAL


@pytest.mark.parametrize(
    ("since", "refusal"),
    [
        (0.0, Refusal.EMBARGO),
        (9.0, Refusal.EMBARGO),
        (10.0, Refusal.NONE),
        (11.0, Refusal.NONE),
        (math.nan, Refusal.EMBARGO),
        (None, Refusal.EMBARGO),
    ],
)
def test_a_culled_seed_waits_out_its_embargo(since: float | None, refusal: Refusal) -> None:
    assert refusal_of(anew(S.CULLED, since), HELD) is refusal


@pytest.mark.parametrize("source", [S.CANCELLED, S.ROLLED_BACK])
@pytest.mark.parametrize("since", [0.0, math.nan, None])
def test_the_embargo_is_for_culled_seeds_only(source: S, since: float | None) -> None:
    assert refusal_of(anew(source, since), HELD) is Refusal.NONE


@pytest.mark.parametrize("since", [0.0, math.nan, None])
def test_without_an_embargo_nobody_waits(since: float | None) -> None:
    assert refusal_of(anew(S.CULLED, since), ON) is Refusal.NONE


def test_the_last_generation_starts_no_other() -> None:
    last, one_before = anew(S.CULLED, generation=LAST_GENERATION), anew(S.CULLED, generation=32_766)
    assert refusal_of(last, ON) is Refusal.GENERATIONS_USED_UP
    assert refusal_of(one_before, ON) is Refusal.NONE
    assert refusal_of(anew(S.FOSSILIZED, generation=LAST_GENERATION), ON) is Refusal.NOT_IN_TABLE


def test_replanting_is_judged_row_by_row_among_other_moves() -> None:
    decided = judge(
        anew(S.CULLED, 3.0),
        Row(S.GERMINATED, S.TRAINING),
        anew(S.CULLED, 30.0),
        anew(99),
        anew(S.TRAINING),
        Row(S.CULLED, S.GERMINATED),
        manager=HELD,
    )
    assert names_of(decided) == [
        "EMBARGO",
        "NONE",
        "NONE",
        "UNKNOWN_STATE",
        "NOT_IN_TABLE",
        "TERMINAL",
    ]
    assert explained(anew(S.CULLED, 3.0), HELD) == "the seed was culled too recently"


def test_a_request_knows_which_of_its_rows_replant() -> None:
    rows = [
        anew(S.CULLED),
        Row(S.CULLED, S.DORMANT, cause=Cause.USER),
        Row(S.CULLED, S.GERMINATED, cause=Cause.REPLANT),
    ]
    assert requests(rows).replants.tolist() == [True, False, False]


# ---- what a person may ask ---------------------------------------------------------------------


def test_each_action_is_one_move() -> None:
    assert dict(ACTIONS) == {
        "germinate": (S.GERMINATED, Cause.USER),
        "cancel": (S.CANCELLED, Cause.USER),
        "cull": (S.CULLED, Cause.USER),
        "rollback": (S.ROLLED_BACK, Cause.USER),
        "replant": (S.DORMANT, Cause.REPLANT),
    }
    assert all(move_of(action) == move for action, move in ACTIONS.items())


@pytest.mark.parametrize("action", ["prune", "", "CULL", "germinate "])
def test_an_unknown_action_is_refused_with_the_known_ones(action: str) -> None:
    with pytest.raises(ConfigError) as caught:
        move_of(action)
    assert caught.value.message == f"no action is named {action!r}"
    assert caught.value.hint == "choose one of: germinate, cancel, cull, rollback, replant"


@pytest.mark.parametrize("action", list(ACTIONS))
def test_what_a_person_asks_is_judged_like_any_other_request(action: str) -> None:
    target, cause = move_of(action)
    rows = [Row(source, target, epochs, cause) for source in S for epochs in (0, 99, 1_000)]
    for manager in (LifecycleManager(), ON):
        assert names_of(judge(*rows, manager=manager)) == [
            verdict(
                row.source,
                row.target,
                row.cause,
                row.epochs,
                row.errors,
                row.metrics,
                "gradient_target",
                replanting=manager.replanting,
            )
            for row in rows
        ]


def test_a_person_cannot_cull_before_the_minimum_nor_past_the_gate() -> None:
    target, cause = move_of("cull")
    assert refusal_of(Row(S.TRAINING, target, 99, cause)) is Refusal.TOO_EARLY
    assert refusal_of(Row(S.EVALUATING, target, 40, cause, metrics={})) is Refusal.GATE
    assert refusal_of(Row(S.GRAFTING, target, 500, cause)) is Refusal.NOT_IN_TABLE


@pytest.mark.parametrize("source", LIVE)
def test_a_person_has_a_way_to_end_every_seed_that_was_planted(source: S) -> None:
    """Given time: no gate shuts all of cancel, cull and roll back."""
    ends = [move_of(action) for action in ("cancel", "cull", "rollback")]
    patient = max(MINIMUM_EPOCHS.values())
    decided = judge(*(Row(source, target, patient, cause, 0, {}) for target, cause in ends))
    assert decided.accepted.any() == (source is not S.DORMANT)
