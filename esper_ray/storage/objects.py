"""The objects of a run, each created once: segments by sha256, all others by number."""

from __future__ import annotations

import hashlib
import re
import time
from typing import Any

from esper_ray.errors import CorruptError, FencedError, StorageUnavailable, TooNewError
from esper_ray.storage import gc_log, manifest
from esper_ray.storage.filesystem import Root
from esper_ray.storage.manifest import LogRef, SegmentRef
from esper_ray.storage.records import absent as absent
from esper_ray.storage.records import header as header
from esper_ray.storage.records import next_number as next_number
from esper_ray.storage.records import numbers as numbers
from esper_ray.storage.records import read_manifest as read_manifest
from esper_ray.storage.replica import Replica

FORMAT_FILE = "FORMAT.json"
FORMAT_VERSION = 1
COMMIT_NAME = re.compile(r"[0-9]{20}\.json")
_CONFIRM_PAUSES_S = (0.05, 0.2, 0.8)
EPOCH_NAME = re.compile(r"[0-9]{8}\.json")
REUSE_S = 3600.0
"""Seconds for which a stored segment is shared without being written anew."""


def commit_path(seq: int) -> str:
    """Where commit `seq` lies below the storage prefix."""
    return f"commits/{seq:020d}.json"


def epoch_path(number: int) -> str:
    """Where the record of one epoch lies below the storage prefix."""
    return f"epochs/{number:08d}.json"


def create_or_confirm(root: Root, path: str, data: bytes) -> None:
    """Create an object; an equal one that stands there is ours, another is a FencedError."""
    for pause_s in _CONFIRM_PAUSES_S:
        try:
            root.create(path, data)
        except (FileExistsError, StorageUnavailable) as error:
            # Whatever the reply says, or if it was lost: the stored object is the truth.
            try:
                ours = root.size(path) == len(data) and root.read(path, len(data)) == data
            except FileNotFoundError:
                if isinstance(error, StorageUnavailable):
                    raise error from None
                time.sleep(pause_s)
                continue  # a conflict with nothing: the same bytes may be tried again
            except StorageUnavailable as unread:
                raise (unread if isinstance(error, FileExistsError) else error) from None
            if not ours:
                raise FencedError(
                    f"{root.url}/{path} belongs to another writer",
                    "stop one of the two runs, or give each its own URL",
                ) from error
        return
    raise StorageUnavailable(
        f"{root.url}/{path} can neither be created nor read: it is said to exist, and to be absent",
        "check what else writes or deletes there, then run the same command again",
    )


def check_format(root: Root) -> None:
    """Raise FileNotFoundError without FORMAT.json, CorruptError unless it is ours."""
    check_format_record(read_manifest(root, FORMAT_FILE), f"{root.url}/{FORMAT_FILE}")


def check_format_record(body: dict[str, Any], where: str) -> None:
    """Raise TooNewError or CorruptError unless FORMAT.json names our version."""
    version = body.get("version")
    if version != FORMAT_VERSION:
        newer = type(version) is int and version > FORMAT_VERSION
        raise (TooNewError if newer else CorruptError)(
            f"{where} has version {version!r}, not {FORMAT_VERSION}",
            "use the esper-ray version that wrote it, or another URL",
        )
    if body.keys() != {"format", "version"}:
        raise CorruptError(f"{where} says more than its version")


def ensure_format(root: Root) -> None:
    """Create FORMAT.json if this place is new; CorruptError if it belongs to another version."""
    try:
        check_format(root)
    except FileNotFoundError:
        create_or_confirm(root, FORMAT_FILE, format_record())


def format_record() -> bytes:
    """The bytes of FORMAT.json."""
    return manifest.encode({"format": manifest.FORMAT, "version": FORMAT_VERSION})


def put_segment(root: Root, name: str, data: bytes, suffix: str, rows: int) -> SegmentRef:
    """Store bytes under their sha256; damaged or old ones that stand there are written anew.

    A manifest that names them must follow within half the grace of garbage collection.
    """
    digest = hashlib.sha256(data).hexdigest()
    file = f"sha256/{digest[:2]}/{digest}.{suffix.lstrip('.')}"
    ref = SegmentRef(name, file, digest, len(data), rows)
    try:
        root.create(ref.path, data)
    except FileExistsError:
        if not _may_be_shared(root, ref):
            write_anew(root, ref.path, data)
    return ref


def _may_be_shared(root: Root, ref: SegmentRef) -> bool:
    """Whether a stored segment is whole, and so young that no garbage collection looks at it."""
    try:
        read_object(root, ref)
        return gc_log.now() - root.modified(ref.path) < REUSE_S
    except (CorruptError, FileNotFoundError):
        # A run that fell back computes the same bytes again; no commit may name the bad ones.
        return False


def write_anew(root: Root, path: str, data: bytes) -> None:
    """Write an object of equal name so that no garbage collection deletes it unnoticed."""
    seen = max(gc_log.record_numbers(root), default=0)
    root.replace(path, data)
    while gc_log.await_sweeps(root, path, seen):
        seen = max(gc_log.record_numbers(root), default=0)
        root.replace(path, data)


def put_log(root: Root, run_epoch: int, seq: int, data: bytes, rows: int) -> LogRef:
    """Create a commit's part of the event log; FencedError if another writer's stands there."""
    file = manifest.log_file(run_epoch, seq)
    ref = LogRef(file, hashlib.sha256(data).hexdigest(), len(data), rows)
    create_or_confirm(root, ref.path, data)
    return ref


def read_object(root: Replica, ref: SegmentRef | LogRef) -> bytes:
    """The bytes that a reference names, their size and sha256 checked; CorruptError otherwise."""
    where = f"{root.url}/{ref.path}"
    try:
        data = root.read(ref.path, ref.size)
    except FileNotFoundError as error:
        role = f" {ref.name!r}" if isinstance(ref, SegmentRef) else ""
        raise CorruptError(f"{where}, {ref.kind}{role}, is missing") from error
    if len(data) != ref.size:
        raise CorruptError(f"{where} has {len(data)} bytes, not {ref.size}")
    if hashlib.sha256(data).hexdigest() != ref.sha256:
        raise CorruptError(f"{where} does not have its sha256")
    return data
