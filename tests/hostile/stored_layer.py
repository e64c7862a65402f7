"""A small real layer as managers store it: shards, snapshots, deltas, seeds, and a reshard."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esper_ray.actors.layer_rows import LayerStaging, layer_schema, load_rows, seed_record
from esper_ray.grafting import GraftingSettings
from esper_ray.layers import ChunkedKasminaLayer
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.storage import CheckpointManager, ManifestRef, Rows, ShardId
from esper_ray.storage.group_commit import CommitPolicy
from tests.builders import move, signals, walk
from tests.hostile.mutations import Aims, Objects

LAYER = "encoder.3"
SEEDS, CHUNK = 90, 2
SHARDS = (2, 3)
"""Shards of the first run epoch and of the second."""

BESIDE = "known.json"
"""What the maker of a stored layer knows of it, beside the folder of the store."""


def new_layer(seeds: int = SEEDS) -> ChunkedKasminaLayer:
    """The layer at birth; its bank has fewer slots than seeds."""
    torch.manual_seed(0)
    return ChunkedKasminaLayer(nn.Linear(4, seeds * CHUNK), seeds, LAYER, hidden=3, kernel="torch")


def rows_of(layer: ChunkedKasminaLayer) -> Rows:
    """All rows of the layer as it is."""
    staged = LayerStaging(layer).stage()
    assert staged is not None
    return staged()


def open_shard(folder: Path, run_epoch: int, index: int, **given: Any) -> CheckpointManager:
    """The writer of one shard."""
    return CheckpointManager(
        str(folder),
        layer_id=LAYER,
        schema=layer_schema(new_layer()),
        shard=ShardId.of(SEEDS, SHARDS[run_epoch - 1])[index],
        run_epoch=run_epoch,
        policy=CommitPolicy(interval_s=60.0, retry_s=0.0, timeout_s=5.0),
        **given,
    )


class Maker:
    """Stores a layer step by step, and what must come back of it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.layer, self.ids, self.steps = new_layer(), dict[str, str](), dict[int, str]()
        self.pins: list[list[ManifestRef]] = []

    def epoch(self, run_epoch: int, saves: dict[int, list[int] | None], seeds: list[int]) -> None:
        """One run epoch: a save for each step, of some seeds or all, and checkpoints of seeds."""
        with contextlib.ExitStack() as stack:
            parents = self.pins[-1] if self.pins else ()
            managers = [
                stack.enter_context(open_shard(self._folder, run_epoch, n, parents=parents))
                for n in range(SHARDS[run_epoch - 1])
            ]
            for step, changed in saves.items():
                self._train(step, changed)
                self._save(managers, step, changed)
            self._save_seeds(managers, seeds)
            self.pins.append([manager.pin() for manager in managers])

    def _train(self, step: int, changed: list[int] | None) -> None:
        """Change weights, moments and alphas of some seeds, or of all."""
        layer, bank = self.layer, self.layer.bank
        ids = torch.arange(SEEDS) if changed is None else torch.tensor(changed)
        slots = bank.slots(ids)
        random = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for value in bank.tensors().values():
                drawn = torch.rand(value.shape, generator=random).to(value.dtype)
                value[slots[slots >= 0]] = drawn[slots[slots >= 0]]
            grafting = layer.rows_in(S.GRAFTING)
            layer.state.alpha[grafting[torch.isin(grafting, ids)]] = 0.1 * step
        layer.state.changed()

    def _save(
        self, managers: list[CheckpointManager], step: int, changed: list[int] | None
    ) -> None:
        rows = rows_of(self.layer)
        self.steps[step] = digest_of(rows)
        for manager in managers:
            shard = manager.shard
            assert shard is not None
            own = np.arange(shard.first, shard.stop)
            kept = own if changed is None else np.intersect1d(own, changed)
            if len(kept) == 0:
                kept = own[:1]
            manager.save_layer(rows.keep(kept), step)
            manager.flush()

    def _save_seeds(self, managers: list[CheckpointManager], seeds: list[int]) -> None:
        for manager in managers:
            shard = manager.shard
            assert shard is not None
            for seed in (seed for seed in seeds if shard.first <= seed < shard.stop):
                saved = manager.save_checkpoint(LAYER, seed, *seed_record(self.layer, seed))
                self.ids[str(saved)] = ""
            manager.flush()


def make_layer(folder: Path) -> None:
    """Store the layer below `folder`, and what is known of it beside that."""
    maker = Maker(folder)
    layer = maker.layer
    walk(layer, list(range(0, 80)), S.TRAINING)
    move(layer, list(range(0, 40)), S.TRAINING, S.GRAFTING)
    move(layer, list(range(0, 10)), S.GRAFTING, S.STABILIZATION)
    maker.epoch(1, {1: None, 2: [3, 20, 35, 70]}, [0, 20, 70, 85])
    move(layer, list(range(10, 15)), S.GRAFTING, S.ROLLED_BACK)
    maker.epoch(2, {3: None, 4: [12, 30, 60, 89]}, [5, 30, 60, 88])
    known = {
        "ids": sorted(maker.ids),
        "steps": maker.steps,
        "pins": [[pin.to_json() for pin in pins] for pins in maker.pins],
    }
    (folder.parent / BESIDE).write_text(json.dumps(known))


# ---- what comes back -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Known:
    """What a stored layer must give back: digests by step, of the pinned cuts, of seeds."""

    steps: dict[int, str]
    pins: tuple[tuple[ManifestRef, ...], ...]
    ids: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> Known:
        """What the maker of the store in `folder` has noted."""
        told = json.loads((folder.parent / BESIDE).read_text())
        return cls(
            {int(step): digest for step, digest in told["steps"].items()},
            tuple(tuple(map(ManifestRef.from_json, pins)) for pins in told["pins"]),
            tuple(told["ids"]),
        )


def digest_of(rows: Rows) -> str:
    """Of every part, name and value of rows."""
    digest = hashlib.sha256()
    parts: dict[str, Mapping[str, Any]] = {**rows.tables, **rows.tensors}
    for part, table in sorted(parts.items()):
        for name, value in sorted(table.items()):
            array = value.numpy() if isinstance(value, Tensor) else value
            digest.update(f"{part}/{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def digest_of_record(record: dict[str, Any]) -> str:
    """Of the state and the tensors of one seed's record."""
    digest = hashlib.sha256(repr((record["seed_id"], record["state_data"])).encode())
    for name, value in sorted((record["blueprint_state"] or {}).items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def inner() -> np.ndarray[Any, np.dtype[np.int64]]:
    """All seeds but the first of each shard, so that every shard is read in pieces."""
    firsts = [shard.first for count in SHARDS for shard in ShardId.of(SEEDS, count)]
    return np.setdiff1d(np.arange(SEEDS), firsts)


def use(rows: Rows) -> None:
    """What a layer of these seeds alone does next; CorruptError where rows are impossible."""
    ids = rows.seed_ids.copy()
    for table in rows.tables.values():
        table["seed_id"] = np.searchsorted(ids, table["seed_id"]).astype(np.int32)
    for tensors in rows.tensors.values():
        own = np.searchsorted(ids, tensors["seed_id"].numpy()).astype(np.int32)
        tensors["seed_id"] = torch.from_numpy(own)
    layer = new_layer(len(ids))
    load_rows(layer, rows)
    layer(torch.ones(2, 4)).sum().backward()
    layer.advance_epoch(signals(layer.state.grafting.seed_ids.tolist()), GraftingSettings(), 1)
    walk(layer, layer.rows_in(S.DORMANT).tolist(), S.TRAINING)
    layer(torch.ones(2, 4))


@contextlib.contextmanager
def told() -> Iterator[list[str]]:
    """Warnings of the store meanwhile."""
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    listener, log = Listener(logging.WARNING), logging.getLogger("esper_ray.storage")
    log.addHandler(listener)
    try:
        yield messages
    finally:
        log.removeHandler(listener)


# ---- its objects ---------------------------------------------------------------------------------


def manifests(objects: Objects) -> list[str]:
    """Paths of all manifests of the layer."""
    return sorted(path for path in objects if path.startswith("layers/"))


def heads(objects: Objects) -> list[str]:
    """Paths of the last manifest of each shard of the newest run epoch."""
    newest: dict[str, str] = {}
    for path in manifests(objects):
        newest[path.rpartition("/")[0]] = path
    last = max(folder.split("/")[2] for folder in newest)
    return [path for folder, path in newest.items() if folder.split("/")[2] == last]


def aims(objects: Objects) -> Aims:
    """No later manifest names the last of each shard, so its loss cannot be seen."""
    layer = heads(objects)[0].rsplit("/", 3)[0]
    first = f"{1:020d}.json"
    places = (f"{layer}/e00000002/s0007/{first}", f"{layer}/e99999999/s0000/{first}")
    return Aims(tuple(heads(objects)), frozenset(heads(objects)), places)
