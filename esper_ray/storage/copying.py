"""Copies of a run, of what came since the last one, or of one commit, into another root."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from esper_ray.errors import CheckpointNotFound, ConfigError, CorruptError, FencedError
from esper_ray.storage import capability, gc_log, manifest, objects, pins, signing
from esper_ray.storage.commit_log import RunLog, lineage
from esper_ray.storage.filesystem import Root
from esper_ray.storage.manifest import LogRef, SegmentRef
from esper_ray.storage.objects import commit_path, epoch_path
from esper_ray.storage.reachability import SEGMENT, layer_manifests
from esper_ray.storage.sources import differ


@dataclass(frozen=True, slots=True)
class CopyReport:
    """What a copy wrote, and how many objects it found there already."""

    written: tuple[str, ...]
    present: int
    bytes_written: int
    left_out: dict[int, str] = field(default_factory=dict)
    """Commits that are not there in the end -> why; only where a run is followed."""


class _Copy:
    """Writes objects once. What is there already is compared; with `read_back` all is read again,
    without it a young object of the right size is taken as it is."""

    def __init__(self, source: RunLog, target: Root, *, read_back: bool) -> None:
        self._source, self._target, self._read_back = source, target, read_back
        self._seen: dict[str, int] = {}
        self._written: list[str] = []

    def named_by(self, path: str, refs: Iterable[SegmentRef | LogRef]) -> None:
        """Copy what a manifest names, before itself; CorruptError where it is not what it names."""
        committed = self._modified(path) is not None
        for ref in refs:
            if ref.path in self._seen or (not self._read_back and self._is_there(ref)):
                continue
            data = self._source.sources.read_object(ref)
            self._put(ref.path, data)
            if not committed and not self._is_young(ref.path):
                # A garbage collection at the target may be about to take what nothing names yet.
                objects.write_anew(self._target, ref.path, data)

    def records(self, paths: Iterable[str]) -> None:
        """Copy objects that carry their own digest; CorruptError where they do not match it."""
        for path in paths:
            body = self._source.sources.read_record(path, lambda body, _: body)
            self._put(path, manifest.encode(body))  # canonical: the stored bytes

    def report(self) -> CopyReport:
        """What has been done so far."""
        size = sum(self._seen[path] for path in self._written)
        return CopyReport(tuple(self._written), len(self._seen) - len(self._written), size)

    def _put(self, path: str, data: bytes) -> None:
        """Create an object, or confirm it; a damaged one is replaced, another run's is refused."""
        try:
            self._target.create(path, data)
        except FileExistsError:
            if self._holds(path, data):
                self._seen[path] = len(data)
                return
            if _is_whole(self._target, path):
                raise FencedError(
                    f"{self._target.url}/{path} belongs to another run, or to another history of "
                    "this one",
                    "copy to another URL",
                ) from None
            self._target.replace(path, data)
        self._written.append(path)
        self._seen[path] = len(data)
        if self._read_back and not self._holds(path, data):
            raise CorruptError(f"{self._target.url}/{path} did not keep what was written")

    def _holds(self, path: str, data: bytes) -> bool:
        try:
            return self._target.read(path, len(data)) == data
        except (CorruptError, FileNotFoundError):
            return False

    def _is_there(self, ref: SegmentRef | LogRef) -> bool:
        if not self._is_young(ref.path) or self._target.size(ref.path) != ref.size:
            return False
        self._seen[ref.path] = ref.size
        return True

    def _is_young(self, path: str) -> bool:
        modified = self._modified(path)
        return modified is not None and gc_log.now() - modified < objects.REUSE_S

    def _modified(self, path: str) -> float | None:
        try:
            return self._target.modified(path)
        except FileNotFoundError:
            return None


def _is_whole(root: Root, path: str) -> bool:
    """Whether an object is what some run wrote there; segments prove it by their name."""
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

    All is read back. CorruptError where the source is damaged, FencedError where the target holds
    another run. Until all is there the target shows no commit that it had not before.
    """
    objects.check_format(source)
    capability.check_conditional_create(target)
    log = RunLog(source)
    copy = _Copy(log, target, read_back=True)
    copy.records([objects.FORMAT_FILE, *map(epoch_path, log.epoch_numbers())])
    layers = list(layer_manifests(source))
    for path in layers:
        copy.named_by(path, manifest.segments(objects.read_manifest(source, path)))
    seqs = log.commit_numbers()
    for seq in seqs:
        copy.named_by(commit_path(seq), manifest.references(log.read_commit(seq)))
    for seq, part in log.log_parts():
        copy.named_by(commit_path(seq), [part])
    _collections(copy, source, target)
    copy.records(layers)
    copy.records(map(commit_path, seqs))
    copy.records(map(pins.pin_path, pins.pin_names(source)))
    return copy.report()


def follow(log: RunLog, target: Root) -> CopyReport:
    """Copy the starts and commits of a run that came after the newest which the target has.

    A commit that is damaged, or was pruned meanwhile, is left out. FencedError where the target
    holds another run.
    """
    there = RunLog(target)
    newest = max(there.commit_numbers(), default=0)
    known = {*there.epoch_numbers()} - {1}  # the first one tells runs apart
    copy = _Copy(log, target, read_back=False)
    starts = [number for number in log.epoch_numbers() if number not in known]
    copy.records([objects.FORMAT_FILE, *map(epoch_path, starts)])
    if newest == 0 and (told := gc_log.pruned_parts(log.root)):
        for seq in lineage(log.epochs(), told):
            copy.named_by(commit_path(seq), [part] if (part := told[seq]) else [])
        _collections(copy, log.root, target)
    left_out = {}
    for seq in log.commit_numbers():
        if seq <= newest:
            continue
        try:
            copy.named_by(commit_path(seq), manifest.references(log.read_commit(seq)))
            copy.records([commit_path(seq)])
        except (CorruptError, CheckpointNotFound) as error:
            left_out[seq] = str(error)
    return replace(copy.report(), left_out=left_out)


def copy_commit(source: Root, target: Root, seq: int) -> CopyReport:
    """Copy one commit, all it names and the event log that led to it, as the target's newest.

    Errors are those of `copy_run`; CheckpointNotFound if the source has no such commit, ConfigError
    for one that a signed run has given up.
    """
    objects.check_format(source)
    capability.check_conditional_create(target)
    log = RunLog(source)
    body = objects.read_manifest(source, commit_path(seq)) if seq in log.commit_numbers() else {}
    if signing.FIELD in body and seq not in log.lineage():
        raise ConfigError(
            f"commit {seq} of {source.url} was given up by a later start, and the run is signed: "
            "to make it the newest of a copy takes the key",
            "copy the whole run",
        )
    copy = _Copy(log, target, read_back=True)
    refs, told = manifest.references(log.read_commit(seq)), log.log_parts(seq)
    copy.records([objects.FORMAT_FILE, *map(epoch_path, log.epoch_numbers())])
    copy.named_by(commit_path(seq), [*(part for _, part in told), *refs])
    _tell(target, {number: part for number, part in told if number != seq})
    copy.records([commit_path(seq)])
    there = RunLog(target)
    if seq not in there.lineage():
        there.open_epoch(seq)  # the source had given it up; here it is what to go on from
    return copy.report()


def same_collections(source: Root, target: Root) -> bool:
    """Whether what the target records of garbage collections is the source's record of them."""
    ours, theirs = (gc_log.record_numbers(place) for place in (source, target))
    if max(theirs, default=0) > max(ours, default=0):
        return False
    return not any(differ(source, target, gc_log.gc_path(number)) for number in theirs)


def _collections(copy: _Copy, source: Root, target: Root) -> None:
    """Tell the target what was pruned: by the source's own record, where it has none of its own."""
    if same_collections(source, target):
        copy.records(map(gc_log.gc_path, gc_log.record_numbers(source)))
    else:
        _tell(target, gc_log.pruned_parts(source))


def _tell(target: Root, parts: Mapping[int, LogRef | None]) -> None:
    """Record the event log of commits that stay behind, as a sweep does for those that it took."""
    known = {*gc_log.pruned_parts(target), *RunLog(target).commit_numbers()}
    left = [
        {"seq": seq, "log": part and part.to_json()}
        for seq, part in parts.items()
        if seq not in known
    ]
    if left:
        number = gc_log.append(target, "sweep", paths={}, commits=left)
        gc_log.append(target, "done", sweep=number)
