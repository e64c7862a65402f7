"""Repair: damaged objects are written anew from a replica where that has the very bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from esper_ray.errors import CorruptError, FencedError
from esper_ray.storage import gc_log, manifest, objects, pins
from esper_ray.storage.collection import GRACE_S
from esper_ray.storage.commit_log import RunLog
from esper_ray.storage.copying import expected
from esper_ray.storage.filesystem import Root
from esper_ray.storage.manifest import LogRef, SegmentRef
from esper_ray.storage.problems import Problem
from esper_ray.storage.reachability import SEGMENT
from esper_ray.storage.replica import Replica
from esper_ray.storage.verification import known_folders, verify_objects

_ROUNDS = 4  # a healed start shows commits, these show segments, these are healed
_MOST_UNNAMED = 2**30  # bytes of a segment that no manifest gives the size of


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What was healed and from where, temporary files removed, and what is still wrong."""

    healed: dict[str, str]
    removed: tuple[str, ...]
    left: tuple[Problem, ...]


def repair(root: Root, replicas: Sequence[Replica], grace_s: float = GRACE_S) -> RepairReport:
    """Write damaged objects anew from the first replica that has their bytes; again, no change.

    Temporary files older than `grace_s` seconds are removed, and nothing else. FencedError if a
    replica holds another run.
    """
    log, healed = RunLog(root), dict[str, str]()
    for replica in replicas:
        _check_same_run(root, replica)
    for _ in range(_ROUNDS):
        found = [p["object"] for p in verify_objects(log) if p["severity"] == "damage"]
        known = {ref.path: ref for ref in expected(root)}
        fresh = {p: url for p in found if (url := _heal(root, p, known.get(p), replicas))}
        fresh |= _heal_pinned(root, replicas)
        healed |= fresh
        if not fresh:
            break
    return RepairReport(healed, _remove_leftovers(root, grace_s), tuple(verify_objects(log)))


def _check_same_run(root: Root, replica: Replica) -> None:
    """Raise FencedError where the first start of both can be read and differs."""
    path = objects.epoch_path(1)
    ours, theirs = (_asked(place, path, manifest.MAX_BYTES) for place in (root, replica))
    if ours != theirs and _is_record(ours) and _is_record(theirs):
        raise FencedError(
            f"{replica.url} holds another run than {root.url}", "name the replica of this run"
        )


def _heal(
    root: Root, path: str, ref: SegmentRef | LogRef | None, replicas: Sequence[Replica]
) -> str | None:
    """Replace one object; the replica that had it, or None."""
    if path.endswith(".json"):
        return _replace(root, path, replicas, manifest.MAX_BYTES, _is_record)
    if ref is not None:
        return _replace(root, path, replicas, ref.size, partial(_has_digest, ref.sha256))
    named = SEGMENT.fullmatch(path.rpartition("/")[2])
    right = partial(_has_digest, named[1] if named else "")
    return _replace(root, path, replicas, _MOST_UNNAMED, right)


def _heal_pinned(root: Root, replicas: Sequence[Replica]) -> dict[str, str]:
    """Bring back commits that are gone although a pin names them and their sha256."""
    healed = {}
    for name in pins.pin_names(root):
        try:
            pin = pins.read_pin(root, name)
        except CorruptError:
            continue
        if pin.seq not in RunLog(root).commit_numbers():
            path, digest = objects.commit_path(pin.seq), pin.sha256
            right = partial(_has_digest, digest)
            if url := _replace(root, path, replicas, manifest.MAX_BYTES, right):
                healed[path] = url
    return healed


def _replace(
    root: Root,
    path: str,
    replicas: Sequence[Replica],
    limit: int,
    right: Callable[[bytes | None], bool],
) -> str | None:
    """Write the first bytes that are right and not there already; the replica that had them."""
    for replica in replicas:
        data = _asked(replica, path, limit)
        if data is not None and right(data) and _asked(root, path, len(data)) != data:
            try:
                root.create(path, data)
            except FileExistsError:
                root.replace(path, data)
            return replica.url
    return None


def _asked(place: Replica, path: str, limit: int) -> bytes | None:
    try:
        return place.read(path, limit)
    except (FileNotFoundError, CorruptError):
        return None


def _is_record(data: bytes | None) -> bool:
    try:
        manifest.decode(data or b"")
    except CorruptError:
        return False
    return True


def _has_digest(digest: str, data: bytes | None) -> bool:
    return data is not None and hashlib.sha256(data).hexdigest() == digest


def _remove_leftovers(root: Root, grace_s: float) -> tuple[str, ...]:
    removed = []
    for folder in known_folders(root):
        for name in root.leftovers(folder):
            path = f"{folder}/{name}" if folder else name
            if gc_log.now() - root.modified(path) >= grace_s:
                root.remove(path)
                removed.append(path)
    return tuple(removed)
