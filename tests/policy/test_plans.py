"""What the default policy proposes, state by state."""

from __future__ import annotations

import math

import pytest

from esper_ray.lifecycle import TERMINAL_STATES, TRANSITION_TABLE, Cause
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.policy import PLANS, Measurement, PolicySettings
from tests.policy.reports import GUILTY, Moves, floats, ints, moves_of, report

P, E, T = Cause.POLICY, Cause.ERROR, Cause.TIMEOUT
PLANNED = [s for s in S if S.DORMANT < s < S.FOSSILIZED]
TABLE: list[tuple[S, int, int, Moves]] = [
    # state, epochs, errors -> moves to try in order
    (S.GERMINATED, 0, 0, [(S.TRAINING, P)]),
    (S.GERMINATED, 9_999, 6, [(S.TRAINING, P)]),
    (S.TRAINING, 299, 5, [(S.GRAFTING, P)]),
    (S.TRAINING, 300, 5, [(S.GRAFTING, P), (S.CULLED, T)]),
    (S.TRAINING, 0, 6, [(S.CULLED, E)]),
    (S.TRAINING, 300, 6, [(S.CULLED, E)]),
    (S.GRAFTING, 199, 5, [(S.STABILIZATION, P)]),
    (S.GRAFTING, 200, 0, [(S.STABILIZATION, P), (S.ROLLED_BACK, T)]),
    (S.GRAFTING, 0, 6, [(S.ROLLED_BACK, E)]),
    (S.GRAFTING, 200, 6, [(S.ROLLED_BACK, E)]),
    (S.STABILIZATION, 0, 5, [(S.EVALUATING, P)]),
    (S.STABILIZATION, 9_999, 5, [(S.EVALUATING, P)]),
    (S.STABILIZATION, 0, 6, [(S.ROLLED_BACK, E)]),
    (S.EVALUATING, 0, 5, [(S.FINE_TUNING, P), (S.CULLED, P)]),
    (S.EVALUATING, 9_999, 5, [(S.FINE_TUNING, P), (S.CULLED, P)]),
    (S.EVALUATING, 0, 6, [(S.FINE_TUNING, P), (S.CULLED, P)]),  # its gate counts errors
    (S.FINE_TUNING, 149, 5, [(S.FOSSILIZED, P)]),
    (S.FINE_TUNING, 150, 0, [(S.FOSSILIZED, P), (S.CULLED, T)]),
    (S.FINE_TUNING, 0, 6, [(S.ROLLED_BACK, E)]),
]


def test_every_planted_state_has_a_plan_and_no_other() -> None:
    assert list(PLANS) == PLANNED


@pytest.mark.parametrize("state", PLANNED)
def test_plans_name_legal_moves_only(state: S) -> None:
    targets = [target for target in PLANS[state] if target is not None]
    assert all(TRANSITION_TABLE[state, target] for target in targets)


@pytest.mark.parametrize("state", PLANNED)
def test_the_first_move_of_a_plan_leads_on_and_the_others_end_the_seed(state: S) -> None:
    plan = PLANS[state]
    assert plan.first == state + 1
    ends = {plan.second, plan.late, plan.failed} - {None}
    assert ends <= TERMINAL_STATES - {S.FOSSILIZED}


def test_whatever_is_in_the_output_has_a_way_out_when_it_fails() -> None:
    for state in (S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING):
        assert PLANS[state].failed is S.ROLLED_BACK


@pytest.mark.parametrize(("state", "epochs", "errors", "expected"), TABLE)
def test_each_state_asks_for_its_next_ones(
    state: S, epochs: int, errors: int, expected: Moves
) -> None:
    seen = report([S.DORMANT, state], epochs, error_count=ints(0, errors))
    assert moves_of(seen) == {1: expected}


def test_seeds_of_all_states_are_planned_for_at_once() -> None:
    states = [row[0] for row in TABLE]
    seen = report(states, [row[1] for row in TABLE], error_count=ints(*(row[2] for row in TABLE)))
    assert moves_of(seen) == {seed: row[3] for seed, row in enumerate(TABLE)}


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_lesson_22_only_the_seed_that_spoils_the_loss_is_rolled_back(loss: float) -> None:
    blended = [S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING]
    innocent = Measurement(loss, loss, math.nan, math.nan)
    for guilty in range(4):
        measured = {i: GUILTY if i == guilty else innocent for i in range(4)}
        moves = moves_of(report(blended, 5, measured=measured))
        assert [seed for seed, m in moves.items() if m == [(S.ROLLED_BACK, E)]] == [guilty]


def test_a_seed_in_training_that_would_spoil_the_loss_only_fails_its_gate() -> None:
    assert moves_of(report([S.TRAINING], 5, measured={0: GUILTY})) == {0: [(S.GRAFTING, P)]}


def test_lesson_23_a_failing_seed_in_grafting_rolls_back() -> None:
    assert moves_of(report([S.GRAFTING], error_count=ints(6))) == {0: [(S.ROLLED_BACK, E)]}


def test_terminal_seeds_ask_for_nothing() -> None:
    terminal = sorted(TERMINAL_STATES)
    errors = ints(9, 9, 9, 9)
    assert moves_of(report(terminal, 1_000, error_count=errors)) == {}


@pytest.mark.parametrize(
    ("name", "state", "epochs"),
    [
        ("training_timeout", S.TRAINING, 7),
        ("fine_tuning_timeout", S.FINE_TUNING, 7),
        ("ramp_epochs", S.GRAFTING, 28),
    ],
)
def test_timeouts_are_settings(name: str, state: S, epochs: int) -> None:
    settings = PolicySettings(germinate_after=10**6, **{name: 7})  # type: ignore[arg-type]
    assert len(moves_of(report([state], epochs - 1), settings)[0]) == 1
    assert moves_of(report([state], epochs), settings)[0][1][1] is Cause.TIMEOUT


def test_the_error_limit_is_a_setting() -> None:
    settings = PolicySettings(germinate_after=10**6, error_limit=1)
    seen = report([S.GRAFTING, S.GRAFTING], error_count=ints(1, 2))
    assert moves_of(seen, settings) == {0: [(S.STABILIZATION, P)], 1: [(S.ROLLED_BACK, E)]}


def test_a_seed_that_is_fully_blended_is_never_too_late_for_it() -> None:
    """Four ramps may be shorter than the minimum of GRAFTING, and such a seed only waits for that.

    Found as a defect: with a ramp of 5 and a minimum of 50 every seed was rolled back at epoch 20.
    """
    settings = PolicySettings(germinate_after=10**6, ramp_epochs=5)
    seen = report([S.GRAFTING, S.GRAFTING], 20, alpha=floats(1.0, 0.999))
    assert moves_of(seen, settings) == {
        0: [(S.STABILIZATION, P)],
        1: [(S.STABILIZATION, P), (S.ROLLED_BACK, T)],
    }
