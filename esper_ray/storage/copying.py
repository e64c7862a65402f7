"""Copies of a run, or of one commit and all that it needs, into another root."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from esper_ray.errors import CorruptError, FencedError
from esper_ray.storage import gc_log, manifest, objects, pins
from esper_ray.storage.commit_log import RunLog
from esper_ray.storage.filesystem import Root
from esper_ray.storage.manifest import LogRef, SegmentRef
from esper_ray.storage.objects import commit_path, epoch_path
from esper_ray.storage.reachability import SEGMENT, layer_manifests


@dataclass(frozen=True, slots=True)
class CopyReport:
    """What a copy wrote, and how much of it was there already, read back and compared."""

    written: tuple[str, ...]
    present: int
    bytes_written: int


class _Target:
    """Writes objects once and reads each back."""

    def __init__(self, source: Root, target: Root) -> None:
        self._source, self._target = source, target
        self._seen: dict[str, int] = {}
        self._written: list[str] = []

    def references(self, refs: Iterable[SegmentRef | LogRef]) -> None:
        """Copy what manifests name; CorruptError where it is not what they name."""
        for ref in refs:
            if ref.path not in self._seen:
                self.put(ref.path, objects.read_object(self._source, ref))

    def records(self, paths: Iterable[str]) -> None:
        """Copy objects that carry their own digest; CorruptError where they do not match it."""
        for path in paths:
            self.put(path, manifest.encode(objects.read_manifest(self._source, path)))

    def put(self, path: str, data: bytes) -> None:
        """Create an object, or confirm it; a damaged one is replaced, another run's is refused."""
        try:
            self._target.create(path, data)
        except FileExistsError:
            if self._holds(path, data):
                self._seen[path] = len(data)
                return
            if _is_whole(self._target, path):
                raise FencedError(
                    f"{self._target.url}/{path} belongs to another run", "copy to another URL"
                ) from None
            self._target.replace(path, data)
        self._written.append(path)
        self._seen[path] = len(data)
        if not self._holds(path, data):
            raise CorruptError(f"{self._target.url}/{path} did not keep what was written")

    def report(self) -> CopyReport:
        """What has been done so far."""
        size = sum(self._seen[path] for path in self._written)
        return CopyReport(tuple(self._written), len(self._seen) - len(self._written), size)

    def _holds(self, path: str, data: bytes) -> bool:
        try:
            return self._target.read(path, len(data)) == data
        except (CorruptError, FileNotFoundError):
            return False


def _is_whole(root: Root, path: str) -> bool:
    """Whether an object is what some run wrote there; segments and log parts prove it by name."""
    try:
        if path.endswith(".json"):
            objects.read_manifest(root, path)
            return True
        named = SEGMENT.fullmatch(path.rpartition("/")[2])
        data = root.read(path, root.size(path))
    except CorruptError:
        return False
    return named is None or hashlib.sha256(data).hexdigest() == named[1]


def copy_run(source: Root, target: Root) -> CopyReport:
    """Copy all that manifests name, and the commits last; again, it copies what is new.

    CorruptError where the source is damaged, FencedError where the target holds another run. Until
    all is there the target shows no commit that it had not before.
    """
    objects.check_format(source)
    log, copy = RunLog(source), _Target(source, target)
    copy.records([objects.FORMAT_FILE, *map(epoch_path, log.epoch_numbers())])
    for path in layer_manifests(source):
        copy.references(manifest.segments(objects.read_manifest(source, path)))
    seqs = log.commit_numbers()
    for seq in seqs:
        copy.references(manifest.references(log.read_commit(seq)))
    copy.references(part for _, part in log.log_parts())
    copy.records(map(gc_log.gc_path, gc_log.record_numbers(source)))
    copy.records(layer_manifests(source))
    copy.records(map(commit_path, seqs))
    copy.records(map(pins.pin_path, pins.pin_names(source)))
    return copy.report()


def copy_commit(source: Root, target: Root, seq: int) -> CopyReport:
    """Copy one commit, all it names and the event log that led to it, as the target's newest.

    Errors are those of `copy_run`; CheckpointNotFound if the source has no such commit.
    """
    objects.check_format(source)
    log, copy = RunLog(source), _Target(source, target)
    body = log.read_commit(seq)
    told = log.log_parts(seq)
    copy.records([objects.FORMAT_FILE, *map(epoch_path, log.epoch_numbers())])
    copy.references(part for _, part in told)
    copy.references(manifest.references(body))
    _tell(target, [(number, part) for number, part in told if number != seq])
    copy.records([commit_path(seq)])
    there = RunLog(target)
    if seq not in there.lineage():
        there.open_epoch(seq)  # the source had given it up; here it is what to go on from
    return copy.report()


def _tell(target: Root, parts: list[tuple[int, LogRef]]) -> None:
    """Record the event log of commits that stay behind, as a sweep does for those that it took."""
    known = {*gc_log.pruned_parts(target), *RunLog(target).commit_numbers()}
    left = [{"seq": seq, "log": part.to_json()} for seq, part in parts if seq not in known]
    if left:
        number = gc_log.append(target, "sweep", paths={}, commits=left)
        gc_log.append(target, "done", sweep=number)


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
    try:
        yield from (part for part in gc_log.pruned_parts(root).values() if part)
    except CorruptError:
        return
