"""Where stored objects are read from: the roots in order, then replicas; and what they gave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from esper_ray.errors import CorruptError, StorageUnavailable, TooNewError
from esper_ray.storage import manifest, objects
from esper_ray.storage.filesystem import Root
from esper_ray.storage.manifest import LogRef, SegmentRef
from esper_ray.storage.replica import Replica

T = TypeVar("T")
_SHOWN = 8
_FAILURES = (CorruptError, StorageUnavailable, FileNotFoundError)


@dataclass(frozen=True, slots=True)
class _Doubted:
    """A replica that answers with bytes within the limit, or fails in one of the known ways."""

    replica: Replica

    @property
    def url(self) -> str:
        return self.replica.url

    def read(self, path: str, limit: int) -> bytes:
        try:
            data: object = self.replica.read(path, limit)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageUnavailable(f"cannot read {self.url}/{path}: {error}") from error
        if not isinstance(data, bytes) or len(data) > limit:
            raise CorruptError(f"{self.url}/{path} is more than {limit} bytes, or no bytes")
        return data


@dataclass(slots=True)
class RestoreReport:
    """What a restore did not find whole in its root, and where it took it from."""

    replaced: dict[str, str] = field(default_factory=dict)
    """Object -> replica that gave it."""
    passed_over: dict[int, str] = field(default_factory=dict)
    """Commits that no replica could heal -> what is wrong with them."""

    def lines(self) -> list[str]:
        """What was taken from replicas, for people; nothing where all was whole."""
        taken = [
            f"{path} is missing or damaged and was read from {url}"
            for path, url in self.replaced.items()
        ]
        if len(taken) > _SHOWN:
            taken = [*taken[:_SHOWN], f"so were {len(taken) - _SHOWN} more"]
        return [*taken, "`esper-ray checkpoints repair` mends this"] if taken else []


class Sources:
    """Places in the order in which they are asked; the last of `roots` is the one that decides."""

    def __init__(self, roots: Sequence[Root], replicas: Sequence[Replica] = ()) -> None:
        self.roots = tuple(roots)
        self.replicas: tuple[Replica, ...] = tuple(_Doubted(replica) for replica in replicas)
        self.places: tuple[Replica, ...] = (*self.roots, *self.replicas)
        self.report = RestoreReport()

    def first(self, path: str, read: Callable[[Replica], T]) -> tuple[int, T]:
        """What `read` returns for the first place where it does not fail, and that place's number.

        If all fail: the failure of the root that decides, which is raised at once where a newer
        version wrote the object. What a replica gave is reported under `path`.
        """
        failures: list[Exception] = []
        deciding = len(self.roots) - 1
        for number, place in enumerate(self.places):
            try:
                found = read(place)
            except _FAILURES as error:
                failures.append(error)
                if number == deciding and isinstance(error, TooNewError):
                    break
                continue
            if number > deciding:
                self.note(path, place)
            return number, found
        raise failures[deciding]

    def note(self, path: str, replica: Replica) -> None:
        """Report that an object was taken from a replica."""
        self.report.replaced[path] = replica.url

    def read_object(self, ref: SegmentRef | LogRef) -> bytes:
        """The bytes that a reference names, from the first place where they are whole."""
        return self.first(ref.path, lambda place: objects.read_object(place, ref))[1]

    def read_record(self, path: str, check: Callable[[dict[str, Any], str], T]) -> T:
        """What `check` makes of a manifest and of its name in messages; a replica of this run's
        where the root's is absent or refused.

        FileNotFoundError or CorruptError as the root gives it.
        """

        def read(place: Replica) -> T:
            body = objects.read_manifest(place, path)
            root = self.roots[-1]
            if isinstance(place, _Doubted) and differ(root, place, objects.epoch_path(1)):
                raise CorruptError(f"{place.url} holds another run than {root.url}")
            return check(body, f"{place.url}/{path}")

        return self.first(path, read)[1]


def differ(root: Root, replica: Replica, path: str) -> bool:
    """Whether both places have a record that can be read, and not the same: two runs, or logs."""
    found = []
    for place in (root, replica):
        try:
            data = place.read(path, manifest.MAX_BYTES)
            manifest.decode(data)
        except _FAILURES:
            return False
        found.append(data)
    return found[0] != found[1]
