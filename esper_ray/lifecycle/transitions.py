"""Which state may follow which, and what a requested move must satisfy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from esper_ray.lifecycle.gates import GATES, GateSettings
from esper_ray.lifecycle.states import ExtendedLifecycle

_S = ExtendedLifecycle


@dataclass(frozen=True, slots=True)
class TransitionContext:
    """What a gate may look at when one seed asks to change state.

    `performance_metrics` holds measured numbers only: a name that is absent was not measured.
    `metadata["objective"]` names the TRAINING objective.
    """

    seed_id: int
    current_state: ExtendedLifecycle
    target_state: ExtendedLifecycle
    epochs_in_state: int = 0
    performance_metrics: Mapping[str, float] = field(default_factory=dict)
    error_count: int = 0
    timestamp: float = 0.0
    metadata: Mapping[str, str] = field(default_factory=dict)


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
