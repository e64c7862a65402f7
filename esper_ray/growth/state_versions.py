"""Every form that a layer's state table has had, and the steps from each to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from torch import Tensor

from esper_ray.errors import MigrationError
from esper_ray.growth.snapshot import COLUMN_NAMES, STATE_SCHEMA, Columns, Schema
from esper_ray.lifecycle import BLENDED_STATES, ExtendedLifecycle
from esper_ray.seeds.phase1 import TO_PHASE2, Phase1State

_S = ExtendedLifecycle
_INT32, _FLOAT32 = (np.dtype(np.int32), 0), (np.dtype(np.float32), 0)

PHASE1, PHASE2, ROWS = 1, 2, 3
NEWEST: Final = ROWS

SCHEMAS: Final[Mapping[int, Schema]] = {
    PHASE1: dict.fromkeys(("seed_id", *COLUMN_NAMES[:4]), _INT32) | {"alpha_blend": _FLOAT32},
    PHASE2: dict.fromkeys(("seed_id", *COLUMN_NAMES), _INT32) | {"alpha_blend": _FLOAT32},
    ROWS: STATE_SCHEMA,
}
"""Columns by version: Phase 1's four, Phase 2's eight, and whole rows as they are stored now."""


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """One layer as it was stored: its table, its tensors, and what was said of it."""

    table: Columns
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    told: Mapping[str, Any] = field(default_factory=dict)


def check_codes(states: Mapping[Phase1State, ExtendedLifecycle], codes: Any) -> None:
    """MigrationError unless every one of these codes, (seeds,), is one of Phase 1's states."""
    strange = ~np.isin(codes, list(states))
    if strange.any():
        seed = int(np.flatnonzero(strange)[0])
        raise MigrationError(f"seed {seed} has the state {int(codes[seed])}, Phase 1 has 0 to 4")


def phase1_to_phase2(stored: StoredLayer) -> StoredLayer:
    """Five states become eleven; what Phase 1 did not know is as in a seed just born."""
    table = stored.table
    check_codes(TO_PHASE2, table["lifecycle_state"])
    states = np.array([TO_PHASE2[code] for code in Phase1State], np.int32)
    state = states[table["lifecycle_state"]]
    blueprint = table["blueprint_id"]  # Phase 1 has no number for none
    nothing = np.full(len(state), -1, np.int32)
    new = {
        **table,
        "lifecycle_state": state,
        "blueprint_id": np.where((state == _S.DORMANT) & (blueprint == 0), nothing, blueprint),
        "parent_state": nothing.copy(),
        "checkpoint_id": nothing.copy(),
        "evaluation_score": np.zeros(len(state), np.int32),
        "error_count": np.zeros(len(state), np.int32),
    }
    ordered = {name: new[name] for name in SCHEMAS[PHASE2]}
    told = {**stored.told, "migrated_from": stored.told.get("migrated_from", PHASE1)}
    return replace(stored, table=ordered, told=told)


def phase2_to_rows(stored: StoredLayer) -> StoredLayer:
    """History and metrics begin empty; alpha is as its state says, a ramp's where it was."""
    table, rows = stored.table, len(stored.table["seed_id"])
    new: Columns = {
        name: table[name] if name in table else np.zeros((rows, width) if width else rows, dtype)
        for name, (dtype, width) in STATE_SCHEMA.items()
    }
    state = table["lifecycle_state"]
    full = np.isin(state, list(BLENDED_STATES)).astype(np.float32)
    new["alpha"] = np.where(state == _S.GRAFTING, table["alpha_blend"], full).astype(np.float32)
    told = {**stored.told, "migrated_from": stored.told.get("migrated_from", PHASE2)}
    return replace(stored, table=new, told=told)


STEPS: Final[Mapping[int, Callable[[StoredLayer], StoredLayer]]] = {
    PHASE1: phase1_to_phase2,
    PHASE2: phase2_to_rows,
}
