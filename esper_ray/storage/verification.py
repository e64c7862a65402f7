"""A check of every object below a root, whether a commit names it or not."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from esper_ray.errors import CorruptError
from esper_ray.storage import gc_log, manifest, objects, pins
from esper_ray.storage.commit_log import RunLog, lineage
from esper_ray.storage.filesystem import Root
from esper_ray.storage.layer_verification import verify_layers
from esper_ray.storage.manifest import LogRef, SegmentRef
from esper_ray.storage.objects import commit_path, epoch_path
from esper_ray.storage.problems import Problem, damage, in_order, note
from esper_ray.storage.reachability import (
    FANOUT,
    LAYER_KEY,
    SEGMENT,
    layer_folders,
    stored_parts,
    stored_segments,
)

_PROBE = re.compile(r"[0-9a-f]{32}")
_TOP = {objects.FORMAT_FILE, "epochs", "commits", "segments", "log", "pins", "gc", "layers"}
_TOP |= {"probes"}  # of `capability`; some stores keep the empty folder, or let nobody delete


def verify_objects(log: RunLog, *, quick: bool = False) -> list[Problem]:
    """Re-hash every object below the root of a log; an empty root has no problems.

    `quick` looks at presence and sizes of segments and log parts, and hashes manifests only.
    """
    if not log.root.names("") and not log.root.leftovers(""):
        return []
    problems = list(_verify_format(log.root))
    problems += _verify_epochs(log)
    refs: dict[str, SegmentRef] = {}
    parts: dict[str, LogRef] = {}
    problems += _verify_commits(log, refs, parts)
    problems += _verify_gc(log, parts)
    problems += _verify_pins(log)
    problems += verify_layers(log.root, refs)
    problems += _verify_segments(log.root, refs, quick=quick)
    problems += _verify_log_parts(log, parts, quick=quick)
    problems += _verify_names(log.root)
    return in_order(problems)


def verify_commit(log: RunLog, seq: int, *, quick: bool = False) -> list[Problem]:
    """Every problem of what one commit needs, and of nothing else."""
    problems = list(_verify_format(log.root))
    try:
        body = log.read_commit(seq)
    except CorruptError as error:
        return in_order([*problems, damage(commit_path(seq), error)])
    try:
        log.read_epoch(int(body["run_epoch"]))
    except FileNotFoundError:
        problems.append(damage(epoch_path(int(body["run_epoch"])), "missing"))
    except CorruptError as error:
        problems.append(damage(epoch_path(int(body["run_epoch"])), error))
    for ref in manifest.references(body):
        problems += _verify_reference(log.root, ref, quick=quick)
    return in_order(problems)


def _verify_reference(root: Root, ref: SegmentRef | LogRef, *, quick: bool) -> Iterator[Problem]:
    try:
        if not quick:
            objects.read_object(root, ref)
        elif (size := root.size(ref.path)) != ref.size:
            yield damage(ref.path, f"has {size} bytes, not {ref.size}")
    except FileNotFoundError:
        yield damage(ref.path, "missing")
    except CorruptError as error:
        yield damage(ref.path, error)


def _verify_gc(log: RunLog, parts: dict[str, LogRef]) -> Iterator[Problem]:
    """Report damaged records; add to `parts` the event logs of what was pruned and still counts."""
    numbers = gc_log.record_numbers(log.root)
    for seq in objects.absent(numbers):
        yield damage(gc_log.gc_path(seq), "missing")
    pruned: dict[int, LogRef | None] = {}
    for seq in numbers:
        try:
            pruned |= gc_log.read_record(log.root, seq).commits
        except CorruptError as error:
            yield damage(gc_log.gc_path(seq), error)
    try:
        told = lineage(log.epochs(), pruned)
    except CorruptError:
        return  # reported as a damaged start
    for seq in told:
        if part := pruned[seq]:
            parts.setdefault(part.path, part)


def _verify_pins(log: RunLog) -> Iterator[Problem]:
    for name in pins.pin_names(log.root):
        try:
            pins.pinned_commit(log, name)
        except CorruptError as error:
            yield damage(pins.pin_path(name), error)


def _verify_format(root: Root) -> Iterator[Problem]:
    try:
        objects.check_format(root)
    except FileNotFoundError:
        yield damage(objects.FORMAT_FILE, "missing")
    except CorruptError as error:
        yield damage(objects.FORMAT_FILE, error)


def _verify_epochs(log: RunLog) -> Iterator[Problem]:
    numbers = log.epoch_numbers()
    for number in objects.absent(numbers):
        yield damage(epoch_path(number), "missing")
    for number in numbers:
        try:
            log.read_epoch(number)
        except CorruptError as error:
            yield damage(epoch_path(number), error)


def _verify_commits(
    log: RunLog, refs: dict[str, SegmentRef], parts: dict[str, LogRef]
) -> Iterator[Problem]:
    """Report damaged commits; add to `refs` and `parts` what the whole ones name."""
    epochs = set(log.epoch_numbers())
    for seq in log.commit_numbers():
        try:
            body = log.read_commit(seq)
        except CorruptError as error:
            yield damage(commit_path(seq), error)
            continue
        if body.get("run_epoch") not in epochs:
            yield damage(commit_path(seq), f"its epoch {body.get('run_epoch')} has no record")
        for ref in manifest.segments(body):
            known = refs.setdefault(ref.path, ref)
            if known.size != ref.size:
                yield damage(commit_path(seq), f"names {ref.path} with another size")
        if part := manifest.log_part(body):
            parts[part.path] = part


def _verify_segments(root: Root, refs: dict[str, SegmentRef], *, quick: bool) -> Iterator[Problem]:
    stored = set(stored_segments(root))
    for path in sorted(refs.keys() | stored):
        if path not in stored:
            yield damage(path, f"missing, named as {refs[path].name!r}")
            continue
        if quick and path in refs:
            yield from _verify_reference(root, refs[path], quick=True)
            continue
        try:
            size = root.size(path)
            data = root.read(path, size)
        except CorruptError as error:
            yield damage(path, error)
            continue
        digest = hashlib.sha256(data).hexdigest()
        named = SEGMENT.fullmatch(path.rpartition("/")[2])
        if named is None or named[1] != digest or path.split("/")[2] != digest[:2]:
            yield damage(path, f"its sha256 is {digest}")
        elif path in refs and size != refs[path].size:
            yield damage(path, f"has {size} bytes, not {refs[path].size}")
        elif path not in refs:
            yield note(path, "orphan")


def _verify_log_parts(log: RunLog, parts: dict[str, LogRef], *, quick: bool) -> Iterator[Problem]:
    for path in sorted(set(stored_parts(log.root)) - parts.keys()):
        yield note(path, "orphan")
    for part in parts.values():
        yield from _verify_reference(log.root, part, quick=quick)


def known_folders(root: Root) -> dict[str, re.Pattern[str]]:
    """Folders below a root that are ours, each with the names that belong there."""
    fanouts = [name for name in root.names("segments/sha256") if FANOUT.fullmatch(name)]
    return {
        "": re.compile("|".join(re.escape(name) for name in sorted(_TOP))),
        "epochs": objects.EPOCH_NAME,
        "commits": objects.COMMIT_NAME,
        "log": manifest.LOG_FILE,
        "pins": pins.PIN_FILE,
        "gc": gc_log.GC_NAME,
        "layers": LAYER_KEY,
        "probes": _PROBE,
        **dict(layer_folders(root)),
        "segments": re.compile("sha256"),
        "segments/sha256": FANOUT,
        **{f"segments/sha256/{fanout}": SEGMENT for fanout in fanouts},
    }


def _verify_names(root: Root) -> Iterator[Problem]:
    """Note what an interrupted writer or somebody else left between our objects."""
    for folder, pattern in known_folders(root).items():
        prefix = f"{folder}/" if folder else ""
        for name in root.leftovers(folder):
            yield note(prefix + name, "a temporary file of an interrupted writer")
        for name in root.names(folder):
            if not pattern.fullmatch(name):
                yield note(prefix + name, "not an object of this format")
