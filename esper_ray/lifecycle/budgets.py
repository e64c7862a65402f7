"""How many seeds may be in TRAINING and GRAFTING at once, and who goes first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from esper_ray.errors import ConfigError
from esper_ray.lifecycle.refusal import Refusal
from esper_ray.lifecycle.requests import Decisions
from esper_ray.lifecycle.states import ExtendedLifecycle

_S = ExtendedLifecycle
UNLIMITED = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Budgets:
    """Seeds in a state at once, per layer and in all; epochs before a culled seed is replanted."""

    training_per_layer: int = UNLIMITED
    training_in_all: int = UNLIMITED
    grafting_per_layer: int = UNLIMITED
    grafting_in_all: int = UNLIMITED
    embargo_epochs: int = 0

    def __post_init__(self) -> None:
        for f in fields(self):
            least = 0 if f.name == "embargo_epochs" else 1
            value = getattr(self, f.name)
            if not least <= value <= UNLIMITED or value != int(value):
                raise ConfigError(
                    f"budget {f.name} is {value}",
                    f"give a whole number from {least} to {UNLIMITED}",
                )


def admit(
    decisions: Sequence[Decisions],
    occupied: Mapping[str, NDArray[np.int64]],
    budgets: Budgets,
) -> list[Decisions]:
    """Refuse rows that would exceed a budget; room that others free counts from the next epoch.

    The layer with the fewest seeds in the state goes first; within a layer, and between equals, the
    seed that has waited longest.
    """
    kept = list(decisions)
    for state, per_layer, in_all in (
        (_S.TRAINING, budgets.training_per_layer, budgets.training_in_all),
        (_S.GRAFTING, budgets.grafting_per_layer, budgets.grafting_in_all),
    ):
        if min(per_layer, in_all) < UNLIMITED:
            total = sum(int(counts[state]) for counts in occupied.values())
            kept = _admit(kept, occupied, state, per_layer, max(in_all - total, 0))
    return kept


def _admit(
    decisions: list[Decisions],
    occupied: Mapping[str, NDArray[np.int64]],
    state: ExtendedLifecycle,
    per_layer: int,
    room: int,
) -> list[Decisions]:
    queue: list[NDArray[np.int64]] = []
    for index, decided in enumerate(decisions):
        asked = decided.requests
        rows = np.flatnonzero(decided.accepted & (asked.target == state))
        waited = asked.epochs_in_state[rows].astype(np.int64)
        rows = rows[np.lexsort((asked.seed_ids[rows], -waited))]
        place = int(occupied[asked.layer_id][state]) + np.arange(len(rows))
        columns = (place, -asked.epochs_in_state[rows].astype(np.int64))
        queue.append(np.stack([*columns, np.full(len(rows), index), rows], axis=1))
    waiting = np.concatenate(queue) if queue else np.empty((0, 4), dtype=np.int64)
    waiting = waiting[np.lexsort((waiting[:, 3], waiting[:, 2], waiting[:, 1], waiting[:, 0]))]
    fits = waiting[:, 0] < per_layer
    fits &= np.cumsum(fits) <= room
    over = waiting[~fits]
    return [
        decided.refuse(over[over[:, 2] == index, 3], Refusal.BUDGET)
        for index, decided in enumerate(decisions)
    ]
