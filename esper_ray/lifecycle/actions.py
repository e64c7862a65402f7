"""What a person may ask of seeds, and the move that each action is."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from esper_ray.errors import ConfigError
from esper_ray.lifecycle.states import Cause, ExtendedLifecycle

_S = ExtendedLifecycle

ACTIONS: Mapping[str, tuple[ExtendedLifecycle, Cause]] = MappingProxyType(
    {
        "germinate": (_S.GERMINATED, Cause.USER),
        "cancel": (_S.CANCELLED, Cause.USER),
        "cull": (_S.CULLED, Cause.USER),
        "rollback": (_S.ROLLED_BACK, Cause.USER),
        "replant": (_S.DORMANT, Cause.REPLANT),
    }
)
"""Target state and cause of each action."""


def move_of(action: str) -> tuple[ExtendedLifecycle, Cause]:
    """Target state and cause of an action; ConfigError lists the known ones."""
    if action not in ACTIONS:
        raise ConfigError(f"no action is named {action!r}", f"choose one of: {', '.join(ACTIONS)}")
    return ACTIONS[action]


def by_people(cause: NDArray[np.int32]) -> NDArray[np.bool_]:
    """(rows,) bool: causes that an action has."""
    return np.isin(cause, [own for _, own in ACTIONS.values()])
