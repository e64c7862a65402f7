"""States, transitions, gates and budgets of seeds: tables and pure functions, without torch."""

from esper_ray.lifecycle.actions import ACTIONS, by_people, move_of
from esper_ray.lifecycle.budgets import UNLIMITED, Budgets
from esper_ray.lifecycle.context import TransitionContext
from esper_ray.lifecycle.gates import (
    GATES,
    RECONSTRUCTION,
    Clause,
    Gate,
    GateSettings,
    Shut,
    gate_of,
)
from esper_ray.lifecycle.manager import LifecycleManager
from esper_ray.lifecycle.refusal import REASONS, Refusal, below, first_failed
from esper_ray.lifecycle.requests import Decisions, Explanation, Requests
from esper_ray.lifecycle.states import (
    ACTIVE_STATES,
    BLENDED_STATES,
    MINIMUM_EPOCHS,
    STEPPED_STATES,
    TERMINAL_STATES,
    Cause,
    ExtendedLifecycle,
)
from esper_ray.lifecycle.transitions import (
    LAST_GENERATION,
    MOVES,
    RENEWABLE,
    TRANSITION_TABLE,
    StateTransition,
)

__all__ = [
    "ACTIONS",
    "ACTIVE_STATES",
    "BLENDED_STATES",
    "GATES",
    "LAST_GENERATION",
    "MINIMUM_EPOCHS",
    "MOVES",
    "REASONS",
    "RECONSTRUCTION",
    "RENEWABLE",
    "STEPPED_STATES",
    "TERMINAL_STATES",
    "TRANSITION_TABLE",
    "UNLIMITED",
    "Budgets",
    "Cause",
    "Clause",
    "Decisions",
    "Explanation",
    "ExtendedLifecycle",
    "Gate",
    "GateSettings",
    "LifecycleManager",
    "Refusal",
    "Requests",
    "Shut",
    "StateTransition",
    "TransitionContext",
    "below",
    "by_people",
    "first_failed",
    "gate_of",
    "move_of",
]
