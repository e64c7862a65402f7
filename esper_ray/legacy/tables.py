"""Phase 1 state of a whole layer, (seeds, 4), as a file holds it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper_ray.errors import MigrationError
from esper_ray.growth import state_versions
from esper_ray.growth.state_versions import SCHEMAS, StoredLayer
from esper_ray.legacy.records import MAX_SEEDS, RANGES
from esper_ray.storage.migrations import migrate

NAMES = ("state_tensor", "alpha_blend", "layer_id")
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def is_table(payload: object) -> bool:
    """Whether a loaded file holds a Phase 1 table rather than a record."""
    return isinstance(payload, Tensor) or (isinstance(payload, dict) and "state_tensor" in payload)


def read_table(payload: Any, stem: str) -> tuple[str, StoredLayer]:
    """Name and state of the layer, in the present form; MigrationError where it is refused.

    The payload is the tensor, or a dict of `state_tensor`, and if need be `alpha_blend` (seeds,)
    and `layer_id`, which is the file's name where it is not given.
    """
    values = {"state_tensor": payload} if isinstance(payload, Tensor) else dict(payload)
    if strange := sorted(str(name)[:80] for name in values if name not in NAMES):
        raise MigrationError(f"it holds {strange[0]!r} beside a Phase 1 table")
    name = values.get("layer_id", stem)
    if name != stem:
        raise MigrationError(f"its layer_id is {name!r}, its file is named {stem!r}")
    stored = _columns(values["state_tensor"], values.get("alpha_blend"))
    return stem, migrate(stored, 1, state_versions.NEWEST, state_versions.STEPS)


def _columns(table: object, alpha_blend: object) -> StoredLayer:
    if not isinstance(table, Tensor) or table.dtype not in _WHOLE or table.ndim != 2:
        raise MigrationError("its state_tensor is no table of whole numbers")
    if table.shape[1] != 4 or not 1 <= len(table) <= MAX_SEEDS:
        raise MigrationError(f"its state_tensor has shape {tuple(table.shape)}, not (seeds, 4)")
    rows = table.to(torch.int64).numpy()
    for column, name in enumerate(list(SCHEMAS[1])[1:5]):
        low, high = (0, 4) if column == 0 else RANGES[name]
        wrong = np.flatnonzero((rows[:, column] < low) | (rows[:, column] > high))
        if len(wrong):
            raise MigrationError(
                f"seed {wrong[0]} has the {name} {rows[wrong[0], column]}, not in {low}..{high}"
            )
    ramp = torch.zeros(len(rows)) if alpha_blend is None else alpha_blend
    if not isinstance(ramp, Tensor) or not ramp.is_floating_point() or ramp.shape != (len(rows),):
        raise MigrationError(f"its alpha_blend is not one number for each of {len(rows)} seeds")
    alpha = ramp.to(torch.float32).numpy()
    if not ((alpha >= 0) & (alpha <= 1)).all():
        raise MigrationError("its alpha_blend is not in [0, 1]")
    columns = {name: rows[:, i].astype(np.int32) for i, name in enumerate(list(SCHEMAS[1])[1:5])}
    ids = np.arange(len(rows), dtype=np.int32)
    return StoredLayer({"seed_id": ids, **columns, "alpha_blend": alpha})
