"""Replicas: second places that may hold an object; a Root is one, a peer's memory another."""

from __future__ import annotations

from typing import Protocol


class Replica(Protocol):
    """Anything that can be asked for the bytes of an object."""

    @property
    def url(self) -> str:
        """What to call this place in messages."""
        ...

    def read(self, path: str, limit: int) -> bytes:
        """An object of at most `limit` bytes; FileNotFoundError if it is not held here.

        Asked where the root has no whole object of that name. Nobody trusts the answer: it is
        checked like what the root gives. StorageUnavailable, or another OSError, if there is none.
        """
        ...


class WritableReplica(Replica, Protocol):
    """A replica that is also told what was stored."""

    def replace(self, path: str, data: bytes) -> None:
        """Hold an object, in the place of what may be held under its name."""
        ...
