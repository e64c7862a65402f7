"""The table of moves is the Phase 2 document's, written out in the oracle a second time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from esper_ray.lifecycle import (
    ACTIVE_STATES,
    BLENDED_STATES,
    GATES,
    LAST_GENERATION,
    MINIMUM_EPOCHS,
    MOVES,
    RENEWABLE,
    STEPPED_STATES,
    TERMINAL_STATES,
    TRANSITION_TABLE,
    Cause,
    Refusal,
    StateTransition,
    TransitionContext,
)
from esper_ray.lifecycle import ExtendedLifecycle as S
from tests.builders import PATHS
from tests.lifecycle.oracle import MINIMA, PHASE_2_TABLE, STATE_CODES, TERMINAL
from tests.lifecycle.rows import LIVE, OPEN


def reached_from(state: S) -> set[S]:
    """Every state that legal moves lead to from `state`, itself left out."""
    reached: set[S] = set()
    front = {state}
    while front:
        front = {t for s in front for t in StateTransition.VALID_TRANSITIONS[s]} - reached
        reached |= front
    return reached


def test_state_codes_are_those_of_the_phase_2_document() -> None:
    assert {state.name: int(state) for state in S} == STATE_CODES


def test_causes_keep_the_numbers_that_histories_hold() -> None:
    assert [c.name for c in Cause] == ["POLICY", "USER", "ERROR", "TIMEOUT", "REPLANT"]
    assert [int(c) for c in Cause] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("source", "target"), list(itertools.product(S, S)))
def test_lesson_17_every_pair_of_states_is_judged_as_in_the_one_table(source: S, target: S) -> None:
    legal = (source.name, target.name) in PHASE_2_TABLE
    context = TransitionContext(0, source, target, 1_000, OPEN)
    reason = None if legal else f"Invalid transition: {source.name} -> {target.name}"
    assert StateTransition.validate_transition(source, target, context) == (legal, reason)


def test_lesson_17_the_matrix_is_the_table_for_all_121_pairs() -> None:
    assert TRANSITION_TABLE.shape == (11, 11)
    assert TRANSITION_TABLE.dtype == np.bool_
    for source, target in itertools.product(S, S):
        listed = target in StateTransition.VALID_TRANSITIONS[source]
        legal = (source.name, target.name) in PHASE_2_TABLE
        assert bool(TRANSITION_TABLE[source, target]) is listed is legal


def test_lesson_17_the_codes_of_moves_are_made_from_the_table() -> None:
    for source, target in itertools.product(S, S):
        legal = (source.name, target.name) in PHASE_2_TABLE
        refused = Refusal.TERMINAL if source.name in TERMINAL else Refusal.NOT_IN_TABLE
        assert MOVES[source, target] == (Refusal.NONE if legal else refused)
    with pytest.raises(ValueError, match="read-only"):
        MOVES[S.CULLED, S.DORMANT] = Refusal.NONE


def test_every_state_has_a_row_in_the_table() -> None:
    assert set(StateTransition.VALID_TRANSITIONS) == set(S)


def test_gates_guard_moves_of_the_table_only() -> None:
    assert {(s.name, t.name) for s, t in GATES} <= PHASE_2_TABLE


def test_terminal_states_are_those_without_a_way_out() -> None:
    assert {s.name for s, out in StateTransition.VALID_TRANSITIONS.items() if not out} == TERMINAL
    assert {s.name for s in TERMINAL_STATES} == TERMINAL
    assert [S(s).name in TERMINAL for s in range(11)] == (~TRANSITION_TABLE.any(axis=1)).tolist()


def test_lesson_16_every_state_can_be_reached_from_dormant() -> None:
    assert reached_from(S.DORMANT) | {S.DORMANT} == set(S) == set(PATHS)


@pytest.mark.parametrize("state", LIVE)
def test_every_living_state_can_end(state: S) -> None:
    assert reached_from(state) & TERMINAL_STATES


@pytest.mark.parametrize("state", list(S))
def test_no_seed_can_return_to_a_state_that_it_left(state: S) -> None:
    assert state not in reached_from(state)


@pytest.mark.parametrize("state", [s for s in LIVE if s >= S.GRAFTING])
def test_whatever_is_in_the_output_can_be_rolled_back(state: S) -> None:
    assert TRANSITION_TABLE[state, S.ROLLED_BACK]


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError, match="does not support item assignment"):
        StateTransition.VALID_TRANSITIONS[S.CULLED] = (S.DORMANT,)  # type: ignore[index]
    with pytest.raises(ValueError, match="read-only"):
        TRANSITION_TABLE[S.CULLED, S.DORMANT] = True


@pytest.mark.parametrize(
    ("group", "codes"),
    [
        (ACTIVE_STATES, {2, 3, 6}),
        (BLENDED_STATES, {4, 5, 6, 7}),
        (STEPPED_STATES, {2, 3, 4, 6, 7}),
        (TERMINAL_STATES, {7, 8, 9, 10}),
    ],
)
def test_groups_of_states_hold_what_the_semantics_say(group: frozenset[S], codes: set[int]) -> None:
    assert {int(state) for state in group} == codes


def test_the_default_minima_are_those_of_the_semantics() -> None:
    assert {state.name: least for state, least in MINIMUM_EPOCHS.items()} == MINIMA


def test_terminal_seeds_other_than_fossilized_are_renewable() -> None:
    assert np.flatnonzero(RENEWABLE).tolist() == [S.CULLED, S.CANCELLED, S.ROLLED_BACK]


def test_the_last_generation_is_the_largest_that_its_column_holds() -> None:
    assert np.iinfo(np.int16).max == LAST_GENERATION
