"""Repair: damaged objects are written anew from a replica where that has the very bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from esper_ray.errors import CorruptError, FencedError
from esper_ray.storage import gc_log, manifest, objects, pins
from esper_ray.storage.collection import GRACE_S
from esper_ray.storage.commit_log import RunLog
from esper_ray.storage.copying import same_collections
from esper_ray.storage.filesystem import Root
from esper_ray.storage.manifest import LogRef, SegmentRef
from esper_ray.storage.problems import Problem
from esper_ray.storage.reachability import SEGMENT, layer_manifests
from esper_ray.storage.sources import differ
from esper_ray.storage.verification import known_folders, verify_objects

_ROUNDS = 4  # a healed start shows commits, these show segments, these are healed
_MOST_UNNAMED = 2**30  # bytes of a segment that no manifest gives the size of


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What was healed and from where, temporary files removed, and what is still wrong."""

    healed: dict[str, str]
    removed: tuple[str, ...]
    left: tuple[Problem, ...]


def repair(root: Root, replicas: Sequence[Root], grace_s: float = GRACE_S) -> RepairReport:
    """Write damaged and lost objects anew from the first replica that has their bytes.

    Lost commits are those that a replica has, and that neither the root nor its record of pruned
    ones knows. Temporary files older than `grace_s` seconds are removed, and nothing else.
    FencedError if a replica holds another run, or a history of this one that went another way.
    """
    healed = dict[str, str]()
    starts = RunLog(root).epoch_numbers()
    for replica in replicas:
        if any(differ(root, replica, path) for path in map(objects.epoch_path, starts)):
            raise FencedError(
                f"{replica.url} holds another run than {root.url}, or another history of it",
                "name the replica of this run",
            )
    for _ in range(_ROUNDS):
        found = [p["object"] for p in verify_objects(RunLog(root)) if p["severity"] == "damage"]
        known = {ref.path: ref for ref in expected(root)}
        fresh = {p: url for p in found if (url := _heal(root, p, known.get(p), replicas))}
        fresh |= _heal_pinned(root, replicas) | _heal_lost(root, replicas)
        healed |= fresh
        if not fresh:
            break
    left = tuple(verify_objects(RunLog(root)))
    return RepairReport(healed, _remove_leftovers(root, grace_s), left)


def expected(root: Root) -> Iterator[SegmentRef | LogRef]:
    """Every reference in the readable manifests of a root."""
    log = RunLog(root)
    for seq in log.commit_numbers():
        try:
            yield from manifest.references(log.read_commit(seq))
        except CorruptError:
            continue
    for path in layer_manifests(root):
        try:
            yield from manifest.segments(objects.read_manifest(root, path))
        except CorruptError:
            continue
    yield from (part for part in (_pruned(root) or {}).values() if part)


def _pruned(root: Root) -> dict[int, LogRef | None] | None:
    """Commits that were pruned, None if that is not known."""
    try:
        return gc_log.pruned_parts(root)
    except CorruptError:
        return None


def _heal(
    root: Root, path: str, ref: SegmentRef | LogRef | None, replicas: Sequence[Root]
) -> str | None:
    """Replace one object; the replica that had it, or None."""
    if path.startswith("gc/"):
        replicas = [replica for replica in replicas if same_collections(root, replica)]
    if path.endswith(".json"):
        return _replace(root, path, replicas, manifest.MAX_BYTES, _is_record)
    if ref is not None:
        return _replace(root, path, replicas, ref.size, partial(_has_digest, ref.sha256))
    named = SEGMENT.fullmatch(path.rpartition("/")[2])
    right = partial(_has_digest, named[1] if named else "")
    return _replace(root, path, replicas, _MOST_UNNAMED, right)


def _heal_pinned(root: Root, replicas: Sequence[Root]) -> dict[str, str]:
    """Bring back commits that are gone although a pin names them and their sha256."""
    healed = {}
    stored = {*RunLog(root).commit_numbers()}
    for name in pins.pin_names(root):
        try:
            pin = pins.read_pin(root, name)
        except CorruptError:
            continue
        if pin.seq not in stored:
            path, right = objects.commit_path(pin.seq), partial(_has_digest, pin.sha256)
            if url := _replace(root, path, replicas, manifest.MAX_BYTES, right):
                healed[path] = url
    return healed


def _heal_lost(root: Root, replicas: Sequence[Root]) -> dict[str, str]:
    """Bring back commits that a replica has and the root does not know, each after its start."""
    pruned = _pruned(root)
    if pruned is None:
        return {}  # what was pruned must not come back
    healed = {}
    for replica in replicas:
        there = RunLog(replica)
        for seq in sorted({*there.commit_numbers()} - {*pruned}):
            try:
                number = int(there.read_commit(seq)["run_epoch"])
            except (CorruptError, KeyError, TypeError, ValueError):
                continue  # of no use: it is damaged there too
            for path in (objects.epoch_path(number), objects.commit_path(seq)):
                absent = _asked(root, path, manifest.MAX_BYTES) is None
                if absent and _replace(root, path, [replica], manifest.MAX_BYTES, _is_record):
                    healed[path] = replica.url
    return healed


def _replace(
    root: Root, path: str, replicas: Sequence[Root], limit: int, right: Callable[[bytes], bool]
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


def _asked(place: Root, path: str, limit: int) -> bytes | None:
    try:
        return place.read(path, limit)
    except (FileNotFoundError, CorruptError):
        return None


def _is_record(data: bytes) -> bool:
    try:
        manifest.decode(data)
    except CorruptError:
        return False
    return True


def _has_digest(digest: str, data: bytes) -> bool:
    return hashlib.sha256(data).hexdigest() == digest


def _remove_leftovers(root: Root, grace_s: float) -> tuple[str, ...]:
    removed = []
    for folder in known_folders(root):
        for name in root.leftovers(folder):
            path = f"{folder}/{name}" if folder else name
            if gc_log.now() - root.modified(path) >= grace_s:
                root.remove(path)
                removed.append(path)
    return tuple(removed)
