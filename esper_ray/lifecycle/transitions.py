"""Which state may follow which, and what a requested move must satisfy."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper_ray.lifecycle.context import TransitionContext
from esper_ray.lifecycle.gates import GateSettings, gate_of
from esper_ray.lifecycle.refusal import Refusal
from esper_ray.lifecycle.states import TERMINAL_STATES, ExtendedLifecycle

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
        gate = gate_of(from_state, to_state, str(context.metadata.get("objective", "")))
        if gate is None:
            return True, None
        reason = gate.refusal(_values(context), settings or GateSettings())
        return reason is None, reason


def _values(context: TransitionContext) -> dict[str, float]:
    counts = {"epochs_in_state": context.epochs_in_state, "error_count": context.error_count}
    return {**context.performance_metrics, **counts}


def _table() -> NDArray[np.bool_]:
    table = np.zeros((len(_S), len(_S)), dtype=np.bool_)
    for source, targets in StateTransition.VALID_TRANSITIONS.items():
        table[source, list(targets)] = True
    table.setflags(write=False)
    return table


TRANSITION_TABLE: Final = _table()
"""(11, 11) bool, [from, to]: the same table for arrays of states."""

MOVES: Final = np.where(TRANSITION_TABLE, Refusal.NONE, Refusal.NOT_IN_TABLE).astype(np.uint8)
"""(11, 11) uint8, [from, to]: what the table alone says of a move, as a Refusal code."""
MOVES[list(TERMINAL_STATES)] = Refusal.TERMINAL
MOVES.setflags(write=False)
RENEWABLE: Final = np.isin(np.arange(len(_S)), [_S.CULLED, _S.CANCELLED, _S.ROLLED_BACK])
"""(11,) bool: states whose seeds may start a new generation, which is no transition."""
LAST_GENERATION: Final = 2**15 - 1
"""Generations are counted in int16."""
