"""The log of garbage collection in `gc/`: what was marked when, and which deletions run now.

A `mark` names candidates. After the grace a `sweep` names those that its writer goes on to delete,
after it has looked once more at what is reachable; a `done` ends it. A writer that needs an old
segment writes it anew and then reads this log: either no sweep names the segment yet, and a later
one finds it changed, or one does, and the writer waits for its end and writes it again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from esper_ray.errors import CorruptError, StorageUnavailable
from esper_ray.storage import manifest
from esper_ray.storage.filesystem import Root
from esper_ray.storage.manifest import LogRef
from esper_ray.storage.records import header, next_number, numbers, read_manifest

GC_NAME: Final = re.compile(r"[0-9]{20}\.json")
SWEEP_S: Final = 120.0
"""Seconds after which a sweep deletes nothing more."""
_ENDED_S = 1.5 * SWEEP_S  # what it had in flight has arrived or failed by then
_POLL_S = 0.2
_ATTEMPTS = 64

now: Callable[[], float] = time.time
pause: Callable[[float], None] = time.sleep


@dataclass(frozen=True, slots=True)
class GcRecord:
    """One record: `paths` maps what it names to the time of its last change, 0.0 in a sweep."""

    seq: int
    kind: str
    paths: Mapping[str, float]
    commits: tuple[tuple[int, LogRef | None], ...]
    ended: int | None

    @classmethod
    def from_json(cls, seq: int, body: Mapping[str, Any]) -> GcRecord:
        """Read a record that nobody vouches for; CorruptError unless every field is right."""
        kind, paths, ended = body.get("kind"), body.get("paths", {}), body.get("sweep")
        commits = body.get("commits", [])
        right = (
            kind in ("mark", "sweep", "done")
            and isinstance(paths, dict)
            and all(type(stamp) is float for stamp in paths.values())
            and isinstance(commits, list)
            and all(isinstance(c, dict) and type(c.get("seq")) is int for c in commits)
            and type(ended) is (int if kind == "done" else type(None))
        )
        if not right:
            raise CorruptError("it is no record of garbage collection")
        parts = [LogRef.from_json(c["log"]) if c.get("log") else None for c in commits]
        pruned = tuple((int(c["seq"]), part) for c, part in zip(commits, parts, strict=True))
        return cls(seq, str(kind), paths, pruned, ended)


def gc_path(seq: int) -> str:
    """Where record `seq` lies below the storage prefix."""
    return f"gc/{seq:020d}.json"


def append(root: Root, kind: str, **fields: object) -> int:
    """Create the next record; its number."""
    body = {**header(kind, 0), **fields}
    data = manifest.encode(body)
    for _ in range(_ATTEMPTS):
        seq = next_number(f"{root.url}/gc", record_numbers(root))
        try:
            root.create(gc_path(seq), data)
        except FileExistsError:
            # Another collector's, or our own whose reply was lost.
            if root.read(gc_path(seq), manifest.MAX_BYTES) != data:
                continue
        return seq
    raise StorageUnavailable(f"{root.url}/gc is written by too many at once", "try again later")


def record_numbers(root: Root) -> list[int]:
    """Numbers of all records, in order."""
    return numbers(root, "gc", GC_NAME)


def read_record(root: Root, seq: int) -> GcRecord:
    """One record; CorruptError naming it if it is damaged, FileNotFoundError if absent."""
    body = read_manifest(root, gc_path(seq))
    try:
        return GcRecord.from_json(seq, body)
    except CorruptError as error:
        raise CorruptError(f"{root.url}/{gc_path(seq)}: {error}") from error


def records(root: Root) -> Iterator[GcRecord]:
    """Every record, oldest first."""
    for seq in record_numbers(root):
        yield read_record(root, seq)


def pruned_parts(root: Root) -> dict[int, LogRef | None]:
    """Commits that sweeps have deleted, or meant to, with the part of the event log of each."""
    return dict(item for record in records(root) for item in record.commits)


def await_sweeps(root: Root, path: str, after: int) -> bool:
    """Whether a sweep named `path` since record `after` or while this waited for its end."""
    named = False
    while True:
        found = list(records(root))
        ended = {record.ended for record in found if record.kind == "done"}
        sweeps = [r for r in found if r.kind == "sweep" and path in r.paths]
        named |= any(record.seq > after for record in sweeps)
        running = [r for r in sweeps if r.seq not in ended and _age(root, r) < _ENDED_S]
        if not running:
            return named
        named = True
        pause(_POLL_S)


def _age(root: Root, record: GcRecord) -> float:
    return now() - root.modified(gc_path(record.seq))
