"""States, transitions and gates of a seed: tables and pure functions, standard library only."""

from esper_ray.lifecycle.context import TransitionContext
from esper_ray.lifecycle.gates import GATES, GateSettings
from esper_ray.lifecycle.manager import Decision, LifecycleManager, TransitionRequest
from esper_ray.lifecycle.states import (
    ACTIVE_STATES,
    BLENDED_STATES,
    MINIMUM_EPOCHS,
    STEPPED_STATES,
    TERMINAL_STATES,
    Cause,
    ExtendedLifecycle,
)
from esper_ray.lifecycle.transitions import StateTransition

__all__ = [
    "ACTIVE_STATES",
    "BLENDED_STATES",
    "GATES",
    "MINIMUM_EPOCHS",
    "STEPPED_STATES",
    "TERMINAL_STATES",
    "Cause",
    "Decision",
    "ExtendedLifecycle",
    "GateSettings",
    "LifecycleManager",
    "StateTransition",
    "TransitionContext",
    "TransitionRequest",
]
