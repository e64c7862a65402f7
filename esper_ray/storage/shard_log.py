"""The log of one shard of a layer, and its one writer."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch

from esper_ray.errors import CorruptError, FencedError, StorageUnavailable
from esper_ray.storage import layer_manifest, manifest, objects
from esper_ray.storage.acknowledgement import Durability
from esper_ray.storage.filesystem import Root
from esper_ray.storage.layer_manifest import (
    LayerSegment,
    Level,
    ManifestRef,
    ShardId,
    ShardManifest,
    segment_name,
)
from esper_ray.storage.layer_reader import LayerReader
from esper_ray.storage.layer_rows import LayerSchema
from esper_ray.storage.manifest import SegmentRef
from esper_ray.storage.replica import WritableReplica
from esper_ray.storage.row_codec import Encoded

_log = logging.getLogger(__name__)
_ATTEMPTS = 64
_PARALLEL = 4


@dataclass(frozen=True, slots=True)
class Commit:
    """A manifest ready to be created, and the bytes of the segments that are new with it."""

    entry: ShardManifest
    data: bytes
    new: dict[str, bytes]

    @property
    def ref(self) -> ManifestRef:
        """The commit by number and digest."""
        entry, digest = self.entry, hashlib.sha256(self.data).hexdigest()
        return ManifestRef(entry.run_epoch, entry.shard.index, entry.seq, digest)


class ShardLog:
    """Writes one shard's manifests, each created after all that it names.

    `open` makes this process the shard's writer; whoever was it before meets a number that is
    taken, and FencedError. The last root of the reader decides who won; the others are copies.
    """

    def __init__(
        self,
        reader: LayerReader,
        shard: ShardId,
        run_epoch: int,
        schema: LayerSchema,
        parents: Sequence[ManifestRef] = (),
        replicas: Sequence[WritableReplica] = (),
    ) -> None:
        self.reader, self.shard, self.run_epoch, self.schema = reader, shard, run_epoch, schema
        self.incarnation = 0
        self._parents, self._replicas = tuple(parents), tuple(replicas)
        self._head: ShardManifest | None = None
        self._present: dict[str, set[str]] = {root.url: set() for root in self._roots}
        self._pool = ThreadPoolExecutor(_PARALLEL, thread_name_prefix="esper-store")

    @property
    def _roots(self) -> tuple[Root, ...]:
        return self.reader.source.roots

    @property
    def head(self) -> ShardManifest:
        """The last manifest; RuntimeError before `open`."""
        if self._head is None:
            raise RuntimeError("open comes before the first commit of a shard's log")
        return self._head

    @property
    def last(self) -> ManifestRef:
        """The last manifest by number and digest."""
        return self._parents[0]

    def open(self, incarnation: int | None = None) -> None:
        """Become the writer; FencedError if one of this or a higher incarnation has been it."""
        try:
            self._open(incarnation)
        except BaseException:
            self.close()
            raise

    def _open(self, incarnation: int | None) -> None:
        for root in self._roots:
            objects.ensure_format(root)
        for _ in range(_ATTEMPTS):
            seqs = self.reader.seqs(self.run_epoch, self.shard.index)
            head = self._newest()
            self.incarnation = self._next_incarnation(head, incarnation)
            try:
                self._bring_up(seqs)
                live = head.layer_state if head else ()
                seq = objects.next_number(self._where(), seqs)
                step = head.step if head else None
                opening = self._commit("open", seq, live, step, {})
                list(self._publish(opening, self._roots[::-1]))  # the deciding root first
            except FencedError:
                continue  # another writer took this number: look again
            return
        raise StorageUnavailable(
            f"{self._where()} is being opened by too many writers", "give each run its own URL"
        )

    def _where(self) -> str:
        return f"shard {self.shard.index} of layer {self.reader.layer_id!r}"

    def _newest(self) -> ShardManifest | None:
        head = self.reader.newest(self.run_epoch, self.shard.index)
        if head is None:
            return None
        _, sha256 = self.reader.manifest(self.run_epoch, self.shard.index, head.seq)
        self._parents = (ManifestRef(self.run_epoch, self.shard.index, head.seq, sha256),)
        if head.shard != self.shard or head.schema.to_json() != self.schema.to_json():
            raise FencedError(
                f"{self._where()} was written as {head.shard} or with other columns in epoch "
                f"{self.run_epoch}",
                "open a new run epoch to change the shards or the columns of a layer",
            )
        return head

    def _next_incarnation(self, head: ShardManifest | None, asked: int | None) -> int:
        before = head.incarnation if head else 0
        if asked is not None and asked <= before:
            raise FencedError(
                f"{self._where()} has had a writer of incarnation {before}, this one is {asked}",
                "stop one of the two, or open the shard with a higher incarnation",
            )
        return before + 1 if asked is None else asked

    def _bring_up(self, seqs: Sequence[int]) -> None:
        """Give the deciding root what an earlier writer has left in a local root only."""
        *local, authority = self._roots
        if not local:
            return
        key, place = self.reader.key, (self.run_epoch, self.shard.index)
        known = layer_manifest.list_seqs(authority, key, *place)
        for seq in [seq for seq in seqs if seq > max(known, default=0)]:
            path = layer_manifest.shard_path(key, *place, seq)
            try:
                entry, _ = self.reader.manifest(*place, seq)
                self._put(authority, [(s.ref, None) for s in entry.segments])
                data = local[0].read(path, manifest.MAX_BYTES)
            except CorruptError as error:
                _log.warning("%s cannot be brought to %s: %s", path, authority.url, error)
                continue
            objects.create_or_confirm(authority, path, data)

    def prepare(
        self,
        seq: int,
        live: Sequence[LayerSegment],
        level: Level,
        encoded: Sequence[Encoded],
        step: int | None,
    ) -> Commit:
        """Manifest `seq`: segments that stay live, then new ones; nothing is written."""
        segments, data = list(live), dict[str, bytes]()
        for one in encoded:
            digest = hashlib.sha256(one.data).hexdigest()
            name = segment_name(level, one.part, seq)
            file = f"sha256/{digest[:2]}/{digest}.{one.suffix}"
            ref = SegmentRef(name, file, digest, len(one.data), one.rows)
            segments.append(LayerSegment.of(ref, level, seq, one))
            data[digest] = one.data
            self.reader.source.memory.put(digest, one.data)
        return self._commit("shard", seq, segments, step, data)

    def _commit(
        self,
        kind: Literal["open", "shard"],
        seq: int,
        segments: Sequence[LayerSegment],
        step: int | None,
        data: dict[str, bytes],
    ) -> Commit:
        header = objects.header(kind, self.run_epoch)
        header["writer"]["incarnation"] = self.incarnation
        entry = ShardManifest(
            self.reader.layer_id,
            self.shard,
            self.run_epoch,
            self.incarnation,
            seq,
            kind,
            step,
            header["time"],
            self.schema,
            tuple(segments),
            self._parents,
            {"torch": torch.__version__, "cuda": torch.version.cuda},
        )
        return Commit(entry, manifest.encode({**header, **layer_manifest.body(entry)}), data)

    def publish(self, commit: Commit) -> Iterator[Durability]:
        """Store the commit in every root in turn, and say what is reached; FencedError if taken.

        After StorageUnavailable the same call may be made again.
        """
        return self._publish(commit, self._roots)

    def _publish(self, commit: Commit, roots: Sequence[Root]) -> Iterator[Durability]:
        entry = commit.entry
        place = (entry.run_epoch, entry.shard.index, entry.seq)
        path = layer_manifest.shard_path(self.reader.key, *place)
        for root in roots:
            self._put(root, [(s.ref, commit.new.get(s.ref.sha256)) for s in entry.segments])
            objects.create_or_confirm(root, path, commit.data)
            if root is roots[-1]:  # before anybody is told, who may ask for the last manifest
                self._head, self._parents = entry, (commit.ref,)
                self.reader.remember(entry, commit.ref)
            yield "durable-local" if root.local else "durable-object"
        self._tell_replicas(path, commit)

    def _tell_replicas(self, path: str, commit: Commit) -> None:
        """Give replicas what is new; one that fails has less to offer, and nothing else is lost."""
        new = {s.ref.path: commit.new.get(s.ref.sha256) for s in commit.entry.segments}
        for replica in self._replicas:
            try:
                for name, data in {**new, path: commit.data}.items():
                    if data is not None:
                        replica.replace(name, data)
            except (OSError, StorageUnavailable) as error:
                _log.warning("%s does not hold %s: %s", replica.url, path, error)

    def _put(self, root: Root, wanted: Sequence[tuple[SegmentRef, bytes | None]]) -> None:
        present = self._present[root.url]
        missing = {ref.path: (ref, data) for ref, data in wanted if ref.path not in present}
        for path in self._pool.map(lambda one: self._put_one(root, *one), missing.values()):
            present.add(path)
        present.intersection_update(ref.path for ref, _ in wanted)  # what this writer still names

    def _put_one(self, root: Root, ref: SegmentRef, data: bytes | None) -> str:
        if data is None:
            data = self.reader.source.read(ref)
        suffix = ref.file.rpartition(".")[2]
        return objects.put_segment(root, ref.name, data, suffix, ref.rows).path

    def close(self) -> None:
        """Let the threads go; nothing is written any more."""
        self._pool.shutdown(wait=True)
