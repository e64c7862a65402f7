"""Which state may follow which, and what a requested move must satisfy."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from esper_ray.lifecycle.context import TransitionContext
from esper_ray.lifecycle.gates import GATES, GateSettings
from esper_ray.lifecycle.states import ExtendedLifecycle

_S = ExtendedLifecycle


class StateTransition:
    """The table of legal moves; diagram, documentation and tests are made from it."""

    VALID_TRANSITIONS: Mapping[ExtendedLifecycle, tuple[ExtendedLifecycle, ...]] = MappingProxyType(
        {
            _S.DORMANT: (_S.GERMINATED,),
            _S.GERMINATED: (_S.TRAINING, _S.CANCELLED),
            _S.TRAINING: (_S.GRAFTING, _S.CULLED, _S.CANCELLED),
            _S.GRAFTING: (_S.STABILIZATION, _S.ROLLED_BACK),
            _S.STABILIZATION: (_S.EVALUATING, _S.ROLLED_BACK),
            _S.EVALUATING: (_S.FINE_TUNING, _S.CULLED, _S.ROLLED_BACK),
            _S.FINE_TUNING: (_S.FOSSILIZED, _S.CULLED, _S.ROLLED_BACK),
            _S.FOSSILIZED: (),
            _S.CULLED: (),
            _S.CANCELLED: (),
            _S.ROLLED_BACK: (),
        }
    )

    @staticmethod
    def validate_transition(
        from_state: ExtendedLifecycle,
        to_state: ExtendedLifecycle,
        context: TransitionContext,
        settings: GateSettings | None = None,
    ) -> tuple[bool, str | None]:
        """Accept `(True, None)` or refuse `(False, reason)` one requested move.

        Judges table and gate; minimum epochs are the LifecycleManager's.
        """
        if to_state not in StateTransition.VALID_TRANSITIONS[from_state]:
            return False, f"Invalid transition: {from_state.name} -> {to_state.name}"
        gate = GATES.get((from_state, to_state))
        if gate is None:
            return True, None
        reason = gate(context, settings or GateSettings())
        return reason is None, reason
