"""The newest objects of a run in the memory of another process."""

from __future__ import annotations

from esper_ray.storage.segment_source import SegmentMemory

LIMIT = 256 * 2**20


class MemoryReplica:
    """A replica that forgets what was not used for longest, beyond `limit` bytes.

    A plain object; or an actor on another machine, which `actors.peers.Peer` starts and calls.
    """

    def __init__(self, limit: int = LIMIT, url: str = "memory of a peer") -> None:
        self.url = url
        self._held = SegmentMemory(limit)

    def read(self, path: str, limit: int) -> bytes:
        """An object of at most `limit` bytes; FileNotFoundError if it is not held, or larger."""
        data = self._held.get(path)
        if data is None or len(data) > limit:
            raise FileNotFoundError(path)
        return data

    def replace(self, path: str, data: bytes) -> None:
        """Hold an object, in the place of what was held under its name."""
        self._held.put(path, data)
