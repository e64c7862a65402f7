"""Replicas: second places that may hold an object, and what a restore took from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from esper_ray.errors import CorruptError, StorageUnavailable
from esper_ray.storage import manifest, objects
from esper_ray.storage.filesystem import Root
from esper_ray.storage.manifest import LogRef, SegmentRef


class Replica(Protocol):
    """Anything that can be asked for the bytes of an object; a Root is one."""

    @property
    def url(self) -> str:
        """What to call this place in messages."""
        ...

    def read(self, path: str, limit: int) -> bytes:
        """At most `limit` bytes of an object; FileNotFoundError if it is not held here.

        Called when the main root has no whole object of that name, from any process that restores.
        Nobody trusts the answer: size and sha256 are checked by the caller.
        """
        ...


class WritableReplica(Replica, Protocol):
    """A replica that is also told what was stored."""

    def replace(self, path: str, data: bytes) -> None:
        """Hold an object, in the place of what may be held under its name."""
        ...


@dataclass(slots=True)
class RestoreReport:
    """What a restore did not find whole in the main root, and where it took it from."""

    replaced: dict[str, str] = field(default_factory=dict)
    """Object -> replica that gave it."""
    passed_over: dict[int, str] = field(default_factory=dict)
    """Commits that no replica could heal -> what is wrong with them."""

    def lines(self) -> list[str]:
        """The report for people, nothing where all was whole."""
        taken = [f"{p} is damaged; it was read from {u}" for p, u in self.replaced.items()]
        return [*taken, *(f"checkpoint {s} is damaged: {p}" for s, p in self.passed_over.items())]


class Sources:
    """The main root and its replicas, in the order in which they are asked."""

    def __init__(self, root: Root, replicas: Sequence[Replica] = ()) -> None:
        self.root, self.replicas = root, tuple(replicas)
        self.report = RestoreReport()

    def read_object(self, ref: SegmentRef | LogRef) -> bytes:
        """The bytes that a reference names, from the first place where they are whole.

        CorruptError as the main root gives it if they are whole nowhere.
        """
        try:
            return objects.read_object(self.root, ref)
        except CorruptError:
            for replica in self.replicas:
                data = _asked(replica, ref.path, ref.size)
                if data is not None and objects.is_content(ref, data):
                    self.report.replaced[ref.path] = replica.url
                    return data
            raise

    def read_manifest(self, path: str) -> dict[str, Any]:
        """One decoded manifest; a replica's only where the stored one is damaged."""
        try:
            return objects.read_manifest(self.root, path)
        except CorruptError:
            for replica in self.replicas:
                data = _asked(replica, path, manifest.MAX_BYTES)
                try:
                    body = None if data is None else manifest.decode(data)
                except CorruptError:
                    continue
                if body is not None:
                    self.report.replaced[path] = replica.url
                    return body
            raise


def _asked(replica: Replica, path: str, limit: int) -> bytes | None:
    """What a replica holds, None if nothing or if it does not answer: it is a second chance."""
    try:
        return replica.read(path, limit)
    except (FileNotFoundError, StorageUnavailable, CorruptError):
        return None


def hold(replica: WritableReplica, root: Root, refs: Iterable[SegmentRef | LogRef]) -> None:
    """Give a replica what a commit names, read from the main root and checked."""
    for ref in refs:
        replica.replace(ref.path, objects.read_object(root, ref))
