"""The table of moves is the Phase 2 document's, written out here a second time."""

from __future__ import annotations

import itertools

import pytest

from esper_ray.lifecycle import (
    ACTIVE_STATES,
    BLENDED_STATES,
    GATES,
    STEPPED_STATES,
    TERMINAL_STATES,
    StateTransition,
    TransitionContext,
)
from esper_ray.lifecycle import ExtendedLifecycle as S

CODES = {
    "DORMANT": 0,
    "GERMINATED": 1,
    "TRAINING": 2,
    "GRAFTING": 3,
    "STABILIZATION": 4,
    "EVALUATING": 5,
    "FINE_TUNING": 6,
    "FOSSILIZED": 7,
    "CULLED": 8,
    "CANCELLED": 9,
    "ROLLED_BACK": 10,
}
PHASE_2_TABLE = {
    ("DORMANT", "GERMINATED"),
    ("GERMINATED", "TRAINING"),
    ("GERMINATED", "CANCELLED"),
    ("TRAINING", "GRAFTING"),
    ("TRAINING", "CULLED"),
    ("TRAINING", "CANCELLED"),
    ("GRAFTING", "STABILIZATION"),
    ("GRAFTING", "ROLLED_BACK"),
    ("STABILIZATION", "EVALUATING"),
    ("STABILIZATION", "ROLLED_BACK"),
    ("EVALUATING", "FINE_TUNING"),
    ("EVALUATING", "CULLED"),
    ("EVALUATING", "ROLLED_BACK"),
    ("FINE_TUNING", "FOSSILIZED"),
    ("FINE_TUNING", "CULLED"),
    ("FINE_TUNING", "ROLLED_BACK"),
}
TERMINAL = {"FOSSILIZED", "CULLED", "CANCELLED", "ROLLED_BACK"}
ALL_METRICS = {
    "local_loss": 0.1,
    "delta_ratio": 0.1,
    "alpha_one_loss_ratio": 1.0,
    "alpha": 1.0,
    "performance_delta": 0.1,
    "stability_score": 1.0,
    "total_improvement": 0.1,
    "final_stability": 1.0,
    "error_rate": 1.0,
}


def context(source: S, target: S) -> TransitionContext:
    """A seed whose every gate is open."""
    return TransitionContext(0, source, target, 1_000, ALL_METRICS)


def test_state_codes_are_those_of_the_phase_2_document() -> None:
    assert {state.name: int(state) for state in S} == CODES


@pytest.mark.parametrize(("source", "target"), list(itertools.product(S, S)))
def test_lesson_17_every_pair_of_states_is_judged_as_in_the_one_table(source: S, target: S) -> None:
    legal = (source.name, target.name) in PHASE_2_TABLE
    verdict = StateTransition.validate_transition(source, target, context(source, target))
    reason = None if legal else f"Invalid transition: {source.name} -> {target.name}"
    assert verdict == (legal, reason)


def test_gates_guard_moves_of_the_table_only() -> None:
    assert {(s.name, t.name) for s, t in GATES} <= PHASE_2_TABLE


def test_terminal_states_are_those_without_a_way_out() -> None:
    assert {s.name for s, out in StateTransition.VALID_TRANSITIONS.items() if not out} == TERMINAL
    assert {s.name for s in TERMINAL_STATES} == TERMINAL


def test_no_seed_can_return_to_a_state_that_it_left() -> None:
    assert all(t > s for s, out in StateTransition.VALID_TRANSITIONS.items() for t in out)


@pytest.mark.parametrize("state", [s for s in S if s.name not in TERMINAL])
def test_every_living_state_can_end(state: S) -> None:
    reached, front = {state}, {state}
    while front:
        front = {t for s in front for t in StateTransition.VALID_TRANSITIONS[s]} - reached
        reached |= front
    assert {s.name for s in reached} & TERMINAL


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError, match="does not support item assignment"):
        StateTransition.VALID_TRANSITIONS[S.CULLED] = (S.DORMANT,)  # type: ignore[index]


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
