"""Segments read from the nearest place that has them whole: memory, a local root, the root."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from esper_ray.errors import CorruptError, EsperError, StorageUnavailable
from esper_ray.storage import objects
from esper_ray.storage.filesystem import Root
from esper_ray.storage.manifest import SegmentRef
from esper_ray.storage.replica import Replica
from esper_ray.storage.row_codec import Head, Piece
from esper_ray.storage.sources import Sources

_log = logging.getLogger(__name__)
MEMORY_BYTES = 64 * 2**20


class SegmentMemory:
    """Bytes of the segments used last, `limit` bytes at most; safe for several threads."""

    def __init__(self, limit: int = MEMORY_BYTES) -> None:
        self._limit, self._held = limit, 0
        self._segments: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str) -> bytes | None:
        """The bytes of that name, None if they are not held."""
        with self._lock:
            if name in self._segments:
                self._segments.move_to_end(name)
            return self._segments.get(name)

    def put(self, name: str, data: bytes) -> None:
        """Hold bytes by name; the longest unused ones go when room is short."""
        with self._lock:
            self._held -= len(self._segments.pop(name, b""))
            if len(data) > self._limit:
                return
            self._segments[name] = data
            self._held += len(data)
            while self._held > self._limit:
                self._held -= len(self._segments.popitem(last=False)[1])


@dataclass(frozen=True, slots=True)
class RangeRef:
    """One piece of one segment, or its head."""

    segment: SegmentRef
    part: Piece | Head

    @property
    def stop(self) -> int:
        """The byte after its last."""
        return self.part.offset + self.part.length


class SegmentSource(Sources):
    """Reads segments from `roots` in order; what one lacks or holds damaged comes from the next,
    or else from a replica.

    With a second root the first is a cache: whole segments read from others are kept there.
    """

    def __init__(
        self,
        roots: Sequence[Root],
        memory: SegmentMemory | None = None,
        replicas: Sequence[Replica] = (),
    ) -> None:
        super().__init__(roots, replicas)
        self.memory = memory or SegmentMemory()

    def note(self, path: str, replica: Replica) -> None:
        """Report, and log as a warning, that an object was taken from a replica."""
        super().note(path, replica)
        _log.warning("%s is missing or damaged and was read from %s", path, replica.url)

    def read(self, ref: SegmentRef) -> bytes:
        """The bytes of a segment, their size and sha256 checked; CorruptError if none has them."""
        held = self.memory.get(ref.sha256)
        if held is not None:
            return held
        number, data = self.first(ref.path, lambda place: objects.read_object(place, ref))
        if number > 0 and len(self.roots) > 1:
            self._keep(ref, data)
        self.memory.put(ref.sha256, data)
        return data

    def read_ranges(self, wanted: Sequence[RangeRef]) -> list[bytes]:
        """The bytes of pieces and heads, all checked; CorruptError if no root has them all."""
        failures: list[EsperError] = []
        held = [self._from_memory(one) for one in wanted]
        missing = [one for one, data in zip(wanted, held, strict=True) if data is None]
        if not missing:
            return [data for data in held if data is not None]
        for root in self.roots:
            try:
                fetched = iter(_read_ranges(root, missing))
            except FileNotFoundError as error:
                failures.append(CorruptError(f"a segment is missing at {root.url}: {error}"))
            except (CorruptError, StorageUnavailable) as error:
                failures.append(error)
            else:
                return [next(fetched) if data is None else data for data in held]
        if self.replicas:
            return [_cut(self.read(one.segment), one) for one in wanted]
        raise failures[-1]

    def _from_memory(self, wanted: RangeRef) -> bytes | None:
        data = self.memory.get(wanted.segment.sha256)
        return None if data is None else _cut(data, wanted)

    def _keep(self, ref: SegmentRef, data: bytes) -> None:
        """Put a segment into the first root; a full or unwritable disk is no reason to fail."""
        with contextlib.suppress(StorageUnavailable):
            try:
                self.roots[0].create(ref.path, data)
            except FileExistsError:
                self.roots[0].replace(ref.path, data)


def _cut(data: bytes, wanted: RangeRef) -> bytes:
    """A range of a whole segment; CorruptError where it is not what the manifest says of it."""
    found = data[wanted.part.offset : wanted.stop]
    wanted.part.check(found)
    return found


def _read_ranges(root: Root, wanted: Sequence[RangeRef]) -> list[bytes]:
    found = root.read_ranges([(one.segment.path, one.part.offset, one.stop) for one in wanted])
    for one, data in zip(wanted, found, strict=True):
        try:
            one.part.check(data)
        except CorruptError as error:
            raise CorruptError(f"{root.url}/{one.segment.path} is damaged: {error}") from error
    return found
