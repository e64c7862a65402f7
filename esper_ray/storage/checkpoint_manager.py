"""The seed documents' CheckpointManager: seeds and layers saved and restored, one shard each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fspath
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper_ray.errors import CheckpointNotFound, ConfigError, EsperError, StoreTimeout
from esper_ray.storage.acknowledgement import (
    LEVELS,
    CheckpointId,
    Durability,
    SaveFuture,
    check_level,
)
from esper_ray.storage.filesystem import Root
from esper_ray.storage.group_commit import CommitPolicy, GroupCommit
from esper_ray.storage.groups import SeedGroup
from esper_ray.storage.layer_manifest import ManifestRef, ShardId
from esper_ray.storage.layer_reader import LayerReader
from esper_ray.storage.layer_rows import LayerSchema, Rows
from esper_ray.storage.layer_writer import LayerWriter
from esper_ray.storage.replica import WritableReplica
from esper_ray.storage.seed_record import RECORD_VERSION, SeedRow, to_record
from esper_ray.storage.segment_source import SegmentSource
from esper_ray.storage.shard_log import ShardLog

_Found = tuple[Rows, LayerSchema, float, Mapping[str, str | None]]
_INTERVAL_S: Final = {True: 0.05, False: 0.25}


class CheckpointManager:
    """Saves and restores the seeds of one layer, or of one shard of it, below a root.

    With `schema` and `shard` it is the shard's one writer; without them it only restores. A save
    returns when its rows are copied; its future tells how far it has come. `local_root` is a
    nearer copy: saves are durable there first, and restores read it first. `replicas`, such as a
    peer's memory, are given what was committed, and asked for what no root has whole. Close it, or
    use it in a `with` block, or what is not committed yet is lost.
    """

    def __init__(
        self,
        root: Root | str | PathLike[str],
        *,
        layer_id: str,
        schema: LayerSchema | None = None,
        shard: ShardId | None = None,
        run_epoch: int = 1,
        incarnation: int | None = None,
        parents: Sequence[ManifestRef] = (),
        local_root: Root | str | PathLike[str] | None = None,
        replicas: Sequence[WritableReplica] = (),
        policy: CommitPolicy | None = None,
    ) -> None:
        if (schema is None) != (shard is None):
            raise ConfigError(
                "a writer needs both the schema of its layer and its shard, a reader none of them"
            )
        roots = [_root(place) for place in (local_root, root) if place is not None]
        if local_root is not None and not roots[0].local:
            raise ConfigError(f"local_root {roots[0].url} is not a folder of this machine")
        self.layer_id, self.schema, self.shard = layer_id, schema, shard
        self.highest: Durability = LEVELS[1] if roots[-1].local else LEVELS[2]
        self.reader = LayerReader(SegmentSource(roots, replicas=replicas), layer_id)
        self._run_epoch = run_epoch
        self._log: ShardLog | None = None
        if schema is not None and shard is not None:
            self._log = ShardLog(self.reader, shard, run_epoch, schema, parents, replicas)
            self._log.open(incarnation)
            self._rows = LayerWriter(self._log)
            self._policy = policy or CommitPolicy(_INTERVAL_S[roots[-1].local])
            self._commits = GroupCommit(
                self._rows,
                self._log.head.seq + 1,
                lambda seq: SeedGroup(seq, schema, SaveFuture(self.highest)),
                self._policy,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except EsperError as failure:
            if error is None:
                raise
            error.add_note(f"what was saved could not be committed either: {failure}")

    # ---- saving ----------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        layer_id: str,
        seed_id: int,
        state_data: Mapping[str, Any],
        blueprint_state: Mapping[str, Tensor] | None = None,
        timeout: float | None = None,
    ) -> CheckpointId:
        """Copy one seed's state, weights and optimiser rows, and return its checkpoint's id.

        Columns that `state_data` does not name are as born. ConfigError, a ValueError, for another
        layer, seed, column or tensor; BackpressureError if the store stays behind for `timeout`
        seconds; what failed in the background before.
        """
        log = self._writer()
        if layer_id != self.layer_id:
            raise ConfigError(
                f"this manager saves layer {self.layer_id!r}, not {layer_id!r}",
                "use the manager of that layer",
            )
        shard = log.shard
        if type(seed_id) is bool or not shard.first <= int(seed_id) < shard.stop:
            raise ConfigError(
                f"seed {seed_id!r} of layer {layer_id!r} is not in {shard.first}..{shard.stop - 1}"
            )
        row = SeedRow(log.schema, state_data, blueprint_state)
        group, event_no = self._commits.add_seed(int(seed_id), row, timeout)
        place = (int(seed_id), self._run_epoch, group.seq, event_no)
        return CheckpointId.of(self.reader.key, *place, group.future)

    @property
    def needs_all(self) -> bool:
        """Whether the next `save_layer` must hold every seed: at first, and after one was lost."""
        self._writer()
        return self._rows.needs_all

    def save_layer(
        self, rows: Rows | Callable[[], Rows], step: int, timeout: float | None = None
    ) -> SaveFuture:
        """Queue rows of this shard's seeds as they were at `step`: all, or those that changed.

        Rows belong to the manager from here on: they are not copied again. They may be given as a
        function that takes them from staging buffers in the background.
        The future fails with ConfigError if they are not of the schema, or if `needs_all` and they
        are not all. BackpressureError as in `save_checkpoint`.
        """
        self._writer()
        if type(step) is not int or step < 0:
            raise ConfigError(f"a layer is saved at a step of at least 0, not {step!r}")
        future = SaveFuture(self.highest)
        self._commits.add_layer(step, rows if callable(rows) else lambda: rows, future, timeout)
        return future

    def flush(self, level: Durability | None = None, timeout: float = 30.0) -> None:
        """Commit all that was saved and wait for `level`, the highest by default.

        Raises what failed in the background; StoreTimeout after `timeout` seconds.
        """
        self._writer()
        wanted = self.highest if level is None else check_level(level, self.highest)
        until = time.monotonic() + timeout
        for future in self._commits.flush():
            future.wait(wanted, max(0.0, until - time.monotonic()))
        self._commits.raise_failure()

    def stats(self) -> dict[str, int]:
        """Saves accepted, groups committed and failed, repeats, groups that wait."""
        self._writer()
        return {**self._commits.counts, "pending": self._commits.pending}

    def pin(self) -> ManifestRef:
        """This shard's last commit by number and digest, for a run commit to name."""
        return self._writer().last

    def close(self, timeout: float | None = None) -> None:
        """Commit what was saved, up to `timeout` seconds or the policy's, and end the writer.

        Raises what failed and was not raised yet; StoreTimeout if the store takes longer.
        """
        if self._log is None:
            return
        limit = self._policy.timeout_s if timeout is None else timeout
        if not self._commits.close(limit):
            raise StoreTimeout(
                f"{self._commits.pending} groups of checkpoints are not stored after {limit} s",
                "look whether the store answers",
            )
        self._log.close()
        self._commits.raise_failure()

    def _writer(self) -> ShardLog:
        if self._log is None:
            raise ConfigError(
                f"this manager of layer {self.layer_id!r} only restores",
                "open it with the layer's schema and a shard to save",
            )
        return self._log

    # ---- restoring -------------------------------------------------------------------------------

    def restore_checkpoint(
        self, checkpoint_id: str, target_device: torch.device | str
    ) -> dict[str, Any]:
        """The record of one seed, version 3 of the seed documents' keys, tensors on a device.

        CheckpointNotFound, a ValueError, for an id that nobody saved; CorruptError if damaged.
        """
        asked = CheckpointId(str(checkpoint_id))
        if asked.layer_key != self.reader.key:
            raise CheckpointNotFound(
                f"Checkpoint not found: {asked} is not of layer {self.layer_id!r}"
            )
        held = self._recall(asked)
        if held is None:
            held = self._fetch(asked)
        rows, schema, timestamp, versions = held
        return {
            "version": RECORD_VERSION,
            "checkpoint_id": str(asked),
            "layer_id": self.layer_id,
            "seed_id": asked.seed_id,
            "timestamp": timestamp,
            **to_record(rows, schema, target_device),
            "metadata": {
                "pytorch_version": versions.get("torch"),
                "cuda_version": versions.get("cuda"),
            },
        }

    def _recall(self, asked: CheckpointId) -> _Found | None:
        """A row that this process has saved not long ago."""
        if self._log is None or asked.run_epoch != self._run_epoch:
            return None
        rows = self._commits.find(asked.seq, asked.event_no)
        rows = self._rows.recent.find(asked.seq, asked.event_no) if rows is None else rows
        if rows is None or int(rows.seed_ids[0]) != asked.seed_id:
            return None
        head = self._log.head
        return rows, self._log.schema, head.timestamp, head.versions

    def _fetch(self, asked: CheckpointId) -> _Found:
        for entry in self.reader.holders(asked.run_epoch, asked.seq):
            if entry.shard.first <= asked.seed_id < entry.shard.stop:
                rows = self.reader.seed(entry, asked.seed_id, asked.event_no)
                if rows is not None:
                    return rows, entry.schema, entry.timestamp, entry.versions
        raise CheckpointNotFound(
            f"Checkpoint not found: {asked} at {self.reader.source.roots[-1].url}",
            "wait for the save's future before another process restores it",
        )

    def restore_layer(
        self,
        step: int | None = None,
        seed_ids: NDArray[np.int64] | None = None,
        device: torch.device | str = "cpu",
        pins: Sequence[ManifestRef] | None = None,
    ) -> Rows:
        """Rows of all seeds, or of some, of the newest step that all shards share, or of `step`.

        `pins` of a run commit take the place of a step. Without both, a step that is damaged is
        passed over for the one before, which is logged as a warning. However many shards wrote
        the layer, any number of managers may read any seeds of it. CheckpointNotFound where nothing
        is stored, CorruptError where it is damaged, IndexError for a seed that the layer has not.
        """
        if pins is not None:
            return self.reader.rows(self.reader.pinned(pins), seed_ids).to(device)
        if step is not None:
            return self.reader.rows(self.reader.cut(step), seed_ids).to(device)
        return self.reader.newest_rows(seed_ids).to(device)


def _root(place: Root | str | PathLike[str]) -> Root:
    return place if isinstance(place, Root) else Root.open(fspath(place))
