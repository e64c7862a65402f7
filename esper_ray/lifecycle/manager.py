"""Judges transition requests: the table, minimum epochs and gates, in that order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from esper_ray.lifecycle.context import TransitionContext
from esper_ray.lifecycle.gates import GateSettings
from esper_ray.lifecycle.states import MINIMUM_EPOCHS, Cause, ExtendedLifecycle
from esper_ray.lifecycle.transitions import StateTransition

_S = ExtendedLifecycle


@dataclass(frozen=True, slots=True)
class TransitionRequest:
    """One seed asks to leave its current state."""

    context: TransitionContext
    generation: int = 0
    cause: Cause = Cause.POLICY


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdict on one request; `reason` is None where it was accepted."""

    request: TransitionRequest
    accepted: bool
    reason: str | None


@dataclass(frozen=True, slots=True)
class LifecycleManager:
    """Accepts or refuses requests; holds settings, never a seed's state."""

    gates: GateSettings = field(default_factory=GateSettings)
    minimum_epochs: Mapping[ExtendedLifecycle, int] = field(
        default_factory=lambda: dict(MINIMUM_EPOCHS)
    )

    def judge(self, request: TransitionRequest) -> Decision:
        """Decide one request without side effects."""
        context = request.context
        source, target = context.current_state, context.target_state
        legal = target in StateTransition.VALID_TRANSITIONS[source]
        early = self._too_early(request) if legal else None
        if early:
            return Decision(request, False, early)
        accepted, reason = StateTransition.validate_transition(source, target, context, self.gates)
        return Decision(request, accepted, reason)

    def _too_early(self, request: TransitionRequest) -> str | None:
        context = request.context
        if context.target_state in (_S.ROLLED_BACK, _S.CANCELLED):
            return None
        if context.target_state is _S.CULLED and request.cause is Cause.ERROR:
            return None
        least = self.minimum_epochs.get(context.current_state, 0)
        if context.epochs_in_state >= least:
            return None
        return (
            f"{context.current_state.name} lasts at least {least} epochs, "
            f"this seed has spent {context.epochs_in_state}"
        )
