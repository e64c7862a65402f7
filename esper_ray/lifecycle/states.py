"""The eleven states of a seed and what each one implies."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType


class ExtendedLifecycle(IntEnum):
    """State of a seed; the number is what the state tensor and every checkpoint hold."""

    DORMANT = 0
    GERMINATED = 1
    TRAINING = 2
    GRAFTING = 3
    STABILIZATION = 4
    EVALUATING = 5
    FINE_TUNING = 6
    FOSSILIZED = 7
    CULLED = 8
    CANCELLED = 9
    ROLLED_BACK = 10


class Cause(IntEnum):
    """Why a transition was asked for; stored beside it in the transition history."""

    POLICY = 0
    USER = 1
    ERROR = 2
    TIMEOUT = 3
    REPLANT = 4


_S = ExtendedLifecycle

TERMINAL_STATES = frozenset({_S.FOSSILIZED, _S.CULLED, _S.CANCELLED, _S.ROLLED_BACK})

ACTIVE_STATES = frozenset({_S.TRAINING, _S.GRAFTING, _S.FINE_TUNING})

BLENDED_STATES = frozenset({_S.STABILIZATION, _S.EVALUATING, _S.FINE_TUNING, _S.FOSSILIZED})
"""States whose alpha is exactly 1."""

STEPPED_STATES = frozenset(
    {_S.TRAINING, _S.GRAFTING, _S.STABILIZATION, _S.FINE_TUNING, _S.FOSSILIZED}
)
"""States in which the optimiser moves the seed's blueprint weights."""

MINIMUM_EPOCHS: Mapping[ExtendedLifecycle, int] = MappingProxyType(
    {
        _S.DORMANT: 0,
        _S.GERMINATED: 0,
        _S.TRAINING: 100,
        _S.GRAFTING: 50,
        _S.STABILIZATION: 20,
        _S.EVALUATING: 30,
        _S.FINE_TUNING: 50,
    }
)
"""Lifecycle epochs that a seed spends in a state before it may leave it, unless configured."""
