"""Writes the golden files: `python -m tests.golden.make`. They are never written over.

Each was what some version stored; what the present version reads from it is in `expected.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esper_ray.actors import persistence
from esper_ray.growth import snapshot
from esper_ray.growth.state_versions import PHASE1, PHASE2, SCHEMAS
from esper_ray.layers import LayerSeeds
from esper_ray.storage import Root, RunLog, codec
from tests.legacy.old_store import SECONDS, record, record_in_ms, record_v1, table

HERE = Path(__file__).parent


def phase1() -> bytes:
    """Phase 1's four columns and alpha, a seed in each of its five states."""
    rows, alpha = (part.numpy() for part in table())
    columns = {name: rows[:, i].copy() for i, name in enumerate(list(SCHEMAS[PHASE1])[1:5])}
    ids = np.arange(len(rows), dtype=np.int32)
    return codec.encode_table({"seed_id": ids, **columns, "alpha_blend": alpha})


def phase2() -> bytes:
    """Phase 2's eight columns and alpha, a seed in each of the eleven states."""
    ids = np.arange(11, dtype=np.int32)
    columns = {name: ids * (i + 1) % 11 for i, name in enumerate(list(SCHEMAS[PHASE2])[1:9])}
    columns |= {"lifecycle_state": ids, "grafting_strategy": ids % 5}
    return codec.encode_table(
        {"seed_id": ids, **columns, "alpha_blend": (ids / 16).astype(np.float32)}
    )


def saved(made: Mapping[str, Any]) -> Callable[[Path], None]:
    """A record as torch writes it."""
    return lambda path: torch.save(dict(made), path)


WEIGHTS = {"up": torch.arange(6.0).reshape(2, 3), "down": torch.ones(2, dtype=torch.float16)}
ROOT = HERE / "root"
LAYER = "encoder.3"


def layer() -> LayerSeeds:
    """Four seeds of a layer, with values of their own in every column."""
    made = LayerSeeds(8, 4, LAYER, blueprint_name="affine", hidden=2, stream="golden")
    columns = snapshot.state_columns(made.state)
    for shift, (name, values) in enumerate(columns.items()):
        if name != "seed_id":
            values.reshape(-1)[:] = (np.arange(values.size) + shift) % 7
    columns["lifecycle_state"][:] = [2, 3, 7, 10]
    columns["alpha"][:] = [0, 0.375, 1, 0]
    snapshot.load_state_columns(made.state, columns, snapshot.entered_grafting(columns))
    for value in made.bank.tensors().values():
        value.copy_(torch.arange(value.numel()).reshape(value.shape))
    made.bank.park(torch.tensor([1, 3]))
    return made


def store_root() -> None:
    """One commit of the layer, as a run stores it."""
    log = RunLog(Root.open(str(ROOT)))
    log.open_epoch(None)
    log.commit(1, {"step": 8, "epoch": 1}, persistence.save_layer(layer(), log))


RECORDS: dict[str, Mapping[str, Any]] = {
    f"encoder.3_b_1_{int(SECONDS)}.pt": record_v1(2, seed_id=1),
    f"encoder.3_b_2_{int(SECONDS)}.pt": record(blueprint_state=WEIGHTS),
    f"encoder.3_b_3_{int(SECONDS * 1000)}.pt": record_in_ms(seed_id=3),
}
TABLES: dict[str, Callable[[], bytes]] = {"state_v1.arrow": phase1, "state_v2.arrow": phase2}


def plain(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Columns as JSON values."""
    return {name: values.tolist() for name, values in columns.items()}


def main() -> None:
    """See the module."""
    for name, table_bytes in TABLES.items():
        if not (HERE / name).exists():
            (HERE / name).write_bytes(table_bytes())
    for name, made in RECORDS.items():
        if not (HERE / name).exists():
            saved(made)(HERE / name)
    from tests.golden.test_golden import read

    if not ROOT.exists():
        store_root()
    if not (HERE / "expected.json").exists():
        (HERE / "expected.json").write_text(json.dumps(read(), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
