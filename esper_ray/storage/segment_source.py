"""Segments read from the nearest place that has them whole: memory, a local root, the root."""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from esper_ray.errors import CorruptError, EsperError, StorageUnavailable
from esper_ray.storage import objects
from esper_ray.storage.filesystem import Root
from esper_ray.storage.manifest import SegmentRef
from esper_ray.storage.row_codec import Piece

MEMORY_BYTES = 64 * 2**20


class SegmentMemory:
    """Bytes of the segments used last, `limit` bytes at most; safe for several threads."""

    def __init__(self, limit: int = MEMORY_BYTES) -> None:
        self._limit, self._held = limit, 0
        self._segments: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, sha256: str) -> bytes | None:
        """The bytes of that sha256, None if they are not held."""
        with self._lock:
            if sha256 in self._segments:
                self._segments.move_to_end(sha256)
            return self._segments.get(sha256)

    def put(self, sha256: str, data: bytes) -> None:
        """Hold bytes that have this sha256; the longest unused ones go when room is short."""
        with self._lock:
            if len(data) > self._limit or sha256 in self._segments:
                return
            self._segments[sha256] = data
            self._held += len(data)
            while self._held > self._limit:
                self._held -= len(self._segments.popitem(last=False)[1])


@dataclass(frozen=True, slots=True)
class PieceRef:
    """One piece of one segment."""

    segment: SegmentRef
    piece: Piece


class SegmentSource:
    """Reads segments from `roots` in order; what one lacks or holds damaged comes from the next.

    With a second root the first is a cache: whole segments read from others are kept there.
    """

    def __init__(self, roots: Sequence[Root], memory: SegmentMemory | None = None) -> None:
        self.roots = tuple(roots)
        self.memory = memory or SegmentMemory()

    def read(self, ref: SegmentRef) -> bytes:
        """The bytes of a segment, their size and sha256 checked; CorruptError if none has them."""
        held = self.memory.get(ref.sha256)
        if held is not None:
            return held
        failures: list[EsperError] = []
        for number, root in enumerate(self.roots):
            try:
                data = objects.read_object(root, ref)
            except (CorruptError, StorageUnavailable) as error:
                failures.append(error)
                continue
            if number > 0 and failures:
                self._keep(ref, data)
            self.memory.put(ref.sha256, data)
            return data
        raise failures[-1]

    def read_pieces(self, wanted: Sequence[PieceRef]) -> list[bytes]:
        """The bytes of pieces, each checked by its crc32; CorruptError if no root has them all."""
        failures: list[EsperError] = []
        held = [self._from_memory(one) for one in wanted]
        missing = [one for one, data in zip(wanted, held, strict=True) if data is None]
        if not missing:
            return [data for data in held if data is not None]
        for root in self.roots:
            try:
                fetched = iter(_read_pieces(root, missing))
            except FileNotFoundError as error:
                failures.append(CorruptError(f"a segment is missing at {root.url}: {error}"))
            except (CorruptError, StorageUnavailable) as error:
                failures.append(error)
            else:
                return [next(fetched) if data is None else data for data in held]
        raise failures[-1]

    def _from_memory(self, wanted: PieceRef) -> bytes | None:
        data = self.memory.get(wanted.segment.sha256)
        if data is None:
            return None
        return data[wanted.piece.offset : wanted.piece.offset + wanted.piece.length]

    def _keep(self, ref: SegmentRef, data: bytes) -> None:
        """Put a segment into the first root; a full or unwritable disk is no reason to fail."""
        with contextlib.suppress(StorageUnavailable):
            try:
                self.roots[0].create(ref.path, data)
            except FileExistsError:
                self.roots[0].replace(ref.path, data)


def _read_pieces(root: Root, wanted: Sequence[PieceRef]) -> list[bytes]:
    spans = [
        (one.segment.path, one.piece.offset, one.piece.offset + one.piece.length) for one in wanted
    ]
    found = root.read_ranges(spans)
    for one, data in zip(wanted, found, strict=True):
        if zlib.crc32(data) != one.piece.crc32:
            raise CorruptError(f"a piece of {root.url}/{one.segment.path} is damaged")
    return found
