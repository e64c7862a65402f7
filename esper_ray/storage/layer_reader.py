"""A layer's rows out of its logs: one seed, some seeds or all, at one step, from any shards."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from esper_ray.errors import CheckpointNotFound, CorruptError, EsperError, TooNewError
from esper_ray.storage import layer_manifest
from esper_ray.storage.filesystem import Root
from esper_ray.storage.layer_manifest import ManifestRef, ShardManifest
from esper_ray.storage.layer_rows import STATE, Rows, join, newest
from esper_ray.storage.layer_segments import no_rows, read_batches
from esper_ray.storage.replica import Replica
from esper_ray.storage.segment_source import SegmentSource

_log = logging.getLogger(__name__)
_CACHED = 256


class LayerReader:
    """Reads what managers have stored of one layer, under any number of shards."""

    def __init__(self, source: SegmentSource, layer_id: str) -> None:
        self.source, self.layer_id = source, layer_id
        self.key = layer_manifest.layer_key(layer_id)
        self._known: dict[tuple[int, int, int], tuple[ShardManifest, str]] = {}
        self._lock = threading.Lock()

    def manifest(self, run_epoch: int, shard: int, seq: int) -> tuple[ShardManifest, str]:
        """One manifest and its sha256; CheckpointNotFound if absent, CorruptError if damaged."""
        where = (run_epoch, shard, seq)
        with self._lock:
            if where in self._known:
                return self._known[where]
        entry, sha256 = self._read(layer_manifest.shard_path(self.key, *where))
        self.remember(entry, ManifestRef(run_epoch, shard, seq, sha256))
        return entry, sha256

    def remember(self, entry: ShardManifest, ref: ManifestRef) -> None:
        """Keep a manifest, which never changes once it is stored."""
        with self._lock:
            if len(self._known) >= _CACHED:
                del self._known[next(iter(self._known))]
            self._known[ref.run_epoch, ref.shard, ref.seq] = (entry, ref.sha256)

    def _read(self, path: str) -> tuple[ShardManifest, str]:
        """From the root that decides, and from copies of it where that does not help."""
        failures: list[EsperError] = []
        replicas = self.source.replicas
        places: list[Replica] = [*reversed(self.source.roots), *replicas]
        for place in places:
            try:
                found = layer_manifest.read(place, path)
            except FileNotFoundError:
                continue
            except EsperError as error:
                failures.append(error)
                continue
            if place in replicas:
                self.source.note(path, place)
            return found
        if failures:
            raise failures[0]
        raise CheckpointNotFound(
            f"layer {self.layer_id!r} has no {path} at {self.source.roots[-1].url}"
        )

    def pinned(self, pins: Sequence[ManifestRef]) -> list[ShardManifest]:
        """The manifests that a run commit pins; CorruptError where one is another or missing."""
        found = []
        for pin in pins:
            entry, sha256 = self.manifest(pin.run_epoch, pin.shard, pin.seq)
            if sha256 != pin.sha256:
                raise CorruptError(
                    f"manifest {pin.seq} of shard {pin.shard} of layer {self.layer_id!r} is not "
                    f"the one that was pinned"
                )
            found.append(entry)
        return self._complete(found)

    def newest_rows(self, seed_ids: NDArray[np.int64] | None = None) -> Rows:
        """Rows of the newest step that is whole; a warning names each one that is passed over.

        CorruptError if none is whole, CheckpointNotFound if there is none.
        """
        bound, damage = None, None
        while True:
            try:
                cut = self.cut(at_most=bound)
            except CheckpointNotFound:
                if damage is None:
                    raise
                raise damage from None
            step = cut[0].step or 0
            try:
                return self.rows(cut, seed_ids)
            except CorruptError as error:
                _log.warning("step %d is damaged and is passed over: %s", step, error)
                bound, damage = step - 1, damage or error

    def cut(self, step: int | None = None, at_most: int | None = None) -> list[ShardManifest]:
        """One manifest per shard, all of one step: the newest that all have, or `step`.

        It is that of the newest run epoch with a snapshot, and no later than step `at_most`;
        CheckpointNotFound where there is none.
        """
        bound = at_most if step is None else step
        epochs = self._union(lambda root: layer_manifest.list_epochs(root, self.key))
        for epoch in reversed(epochs):
            heads = [h for n in self.shards(epoch) if (h := self.newest(epoch, n, bound))]
            if heads and all(head.layer_state for head in heads):
                return self._aligned(heads, step)
            if parents := [parent for head in heads for parent in head.parents]:
                return self.pinned(sorted(set(parents), key=lambda pin: pin.shard))
        asked = "" if step is None else f" of step {step}"
        raise CheckpointNotFound(
            f"layer {self.layer_id!r} has no snapshot{asked} at {self.source.roots[-1].url}",
            "check the URL and the layer's id; save_layer with all seeds stores the first one",
        )

    def shards(self, run_epoch: int) -> list[int]:
        """Numbers of the shards that wrote in a run epoch."""
        return self._union(lambda root: layer_manifest.list_shards(root, self.key, run_epoch))

    def seqs(self, run_epoch: int, shard: int) -> list[int]:
        """Numbers of a shard's manifests, in order."""
        return self._union(lambda root: layer_manifest.list_seqs(root, self.key, run_epoch, shard))

    def _union(self, listing: Callable[[Root], list[int]]) -> list[int]:
        return sorted({number for root in self.source.roots for number in listing(root)})

    def _aligned(self, heads: list[ShardManifest], step: int | None) -> list[ShardManifest]:
        wanted = min(head.step or 0 for head in heads) if step is None else step
        found = [
            h if h.step == wanted else self.newest(h.run_epoch, h.shard.index, wanted)
            for h in heads
        ]
        whole = [entry for entry in found if entry is not None and entry.step == wanted]
        if len(whole) < len(found):
            raise CheckpointNotFound(
                f"the shards of layer {self.layer_id!r} have no snapshot of step {wanted} together",
                "restore by the pins of a run commit, or name a step that every shard has saved",
            )
        return self._complete(whole)

    def newest(self, run_epoch: int, shard: int, step: int | None = None) -> ShardManifest | None:
        """The newest whole manifest, or the newest of at most `step`, None if there is none.

        TooNewError for one of a newer version: to go on before it would give up what it has done.
        """
        for seq in reversed(self.seqs(run_epoch, shard)):
            try:
                entry, _ = self.manifest(run_epoch, shard, seq)
            except TooNewError:
                raise
            except CorruptError as error:
                _log.warning("a damaged manifest is passed over: %s", error)
                continue
            if step is None or (entry.step is not None and entry.step <= step):
                return entry
        return None

    def _complete(self, cut: list[ShardManifest]) -> list[ShardManifest]:
        """The same by seeds; CorruptError unless the shards divide all seeds among them."""
        ordered = sorted(cut, key=lambda entry: entry.shard.first)
        counts = {entry.shard.count for entry in ordered}
        bounds = [(entry.shard.first, entry.shard.stop) for entry in ordered]
        meet = all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
        if counts != {len(ordered)} or not meet or bounds[0][0] != 0:
            raise CorruptError(
                f"the shards of layer {self.layer_id!r} that are stored hold seeds {bounds}"
            )
        if len({str(entry.schema.to_json()) for entry in ordered}) != 1:
            raise CorruptError(f"the shards of layer {self.layer_id!r} differ in their columns")
        return ordered

    def rows(self, cut: Sequence[ShardManifest], seed_ids: NDArray[np.int64] | None = None) -> Rows:
        """Newest row of every seed of a cut, or of some seeds, by seed id; CorruptError if damaged.

        Some seeds cost range reads of the pieces that can hold them, checked by crc32; all cost
        whole segments, checked by sha256. IndexError for a seed that the layer has not.
        """
        stop = max(entry.shard.stop for entry in cut)
        if seed_ids is not None and not ((seed_ids >= 0) & (seed_ids < stop)).all():
            raise IndexError(f"layer {self.layer_id!r} has seeds 0..{stop - 1} only")
        parts = [self._shard_rows(entry, seed_ids) for entry in cut]
        found = join([part for part in parts if part is not None] or [no_rows(cut[0].schema)])
        wanted = np.arange(stop) if seed_ids is None else np.unique(seed_ids)
        if not np.array_equal(found.seed_ids, wanted):
            raise CorruptError(f"layer {self.layer_id!r} lacks rows of seeds that it should have")
        return found

    def _shard_rows(self, entry: ShardManifest, seed_ids: NDArray[np.int64] | None) -> Rows | None:
        shard, mine = entry.shard, None
        if seed_ids is not None:
            mine = seed_ids[(seed_ids >= shard.first) & (seed_ids < shard.stop)]
            if len(mine) == 0:
                return None
            whole = len(np.unique(mine)) == shard.stop - shard.first
            mine = None if whole else mine
        batches = read_batches(self.source, entry.layer_state, entry.schema, mine)
        if not batches:
            raise CheckpointNotFound(f"shard {shard.index} of {self.layer_id!r} has no snapshot")
        found = newest(batches)
        if len(found) and not shard.first <= found.seed_ids[0] <= found.seed_ids[-1] < shard.stop:
            raise CorruptError(f"shard {shard.index} of {self.layer_id!r} holds foreign seeds")
        return found

    def seed(self, entry: ShardManifest, seed_id: int, event_no: int) -> Rows | None:
        """The row that one seed checkpoint of this manifest stored, None if it has none such."""
        batches = read_batches(self.source, entry.seeds, entry.schema, np.array([seed_id]))
        if not batches or not len(batches[0]):
            return None
        [found] = batches
        if len(found) > 1 or found.tables[STATE]["event_no"][0] != event_no:
            found = found.only(event_no)
        return found if len(found) == 1 else None

    def holders(self, run_epoch: int, seq: int) -> Iterator[ShardManifest]:
        """Manifests of that number, of whatever shard; those that are known come first."""
        with self._lock:
            known = [n for (epoch, n, number) in self._known if (epoch, number) == (run_epoch, seq)]
        for number in known:
            yield self.manifest(run_epoch, number, seq)[0]
        for number in self.shards(run_epoch):
            if number not in known:
                with contextlib.suppress(CheckpointNotFound):
                    yield self.manifest(run_epoch, number, seq)[0]
