"""A check of every object below a root, whether a commit names it or not."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Literal, TypedDict

from esper_ray.errors import CorruptError
from esper_ray.storage import manifest, objects, pins
from esper_ray.storage.commit_log import RunLog
from esper_ray.storage.filesystem import Root
from esper_ray.storage.manifest import LogRef, SegmentRef
from esper_ray.storage.objects import commit_path, epoch_path

_FANOUT = re.compile(r"[0-9a-f]{2}")
_SEGMENT = re.compile(r"([0-9a-f]{64})\.(?:arrow|safetensors)")
_TOP = {objects.FORMAT_FILE, "epochs", "commits", "segments", "log", "pins"}


class Problem(TypedDict):
    """One finding: "damage" is bytes lost or changed, "note" is harmless."""

    object: str
    problem: str
    severity: Literal["damage", "note"]


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
    problems += _verify_pins(log)
    problems += _verify_segments(log.root, refs, quick=quick)
    problems += _verify_log_parts(log, parts, quick=quick)
    problems += _verify_names(log.root)
    return _in_order(problems)


def verify_commit(log: RunLog, seq: int, *, quick: bool = False) -> list[Problem]:
    """Every problem of what one commit needs, and of nothing else."""
    problems = list(_verify_format(log.root))
    try:
        body = log.read_commit(seq)
    except CorruptError as error:
        return _in_order([*problems, _damage(commit_path(seq), error)])
    try:
        log.read_epoch(int(body["run_epoch"]))
    except FileNotFoundError:
        problems.append(_damage(epoch_path(int(body["run_epoch"])), "missing"))
    except CorruptError as error:
        problems.append(_damage(epoch_path(int(body["run_epoch"])), error))
    for ref in manifest.references(body):
        problems += _verify_reference(log.root, ref, quick=quick)
    return _in_order(problems)


def _in_order(problems: list[Problem]) -> list[Problem]:
    return sorted(problems, key=lambda problem: (problem["object"], problem["problem"]))


def _verify_reference(root: Root, ref: SegmentRef | LogRef, *, quick: bool) -> Iterator[Problem]:
    try:
        if not quick:
            objects.read_object(root, ref)
        elif (size := root.size(ref.path)) != ref.size:
            yield _damage(ref.path, f"has {size} bytes, not {ref.size}")
    except FileNotFoundError:
        yield _damage(ref.path, "missing")
    except CorruptError as error:
        yield _damage(ref.path, error)


def _verify_pins(log: RunLog) -> Iterator[Problem]:
    for name in pins.pin_names(log.root):
        try:
            pins.pinned_commit(log.root, name)
        except CorruptError as error:
            yield _damage(pins.pin_path(name), error)


def _damage(path: str, problem: object) -> Problem:
    return {"object": path, "problem": str(problem), "severity": "damage"}


def _note(path: str, problem: str) -> Problem:
    return {"object": path, "problem": problem, "severity": "note"}


def _verify_format(root: Root) -> Iterator[Problem]:
    try:
        objects.check_format(root)
    except FileNotFoundError:
        yield _damage(objects.FORMAT_FILE, "missing")
    except CorruptError as error:
        yield _damage(objects.FORMAT_FILE, error)


def _verify_epochs(log: RunLog) -> Iterator[Problem]:
    numbers = log.epoch_numbers()
    for number in sorted(set(range(1, max(numbers, default=0))) - set(numbers)):
        yield _damage(epoch_path(number), "missing")
    for number in numbers:
        try:
            log.read_epoch(number)
        except CorruptError as error:
            yield _damage(epoch_path(number), error)


def _verify_commits(
    log: RunLog, refs: dict[str, SegmentRef], parts: dict[str, LogRef]
) -> Iterator[Problem]:
    """Report damaged commits; add to `refs` and `parts` what the whole ones name."""
    epochs = set(log.epoch_numbers())
    for seq in log.commit_numbers():
        try:
            body = log.read_commit(seq)
        except CorruptError as error:
            yield _damage(commit_path(seq), error)
            continue
        if body.get("run_epoch") not in epochs:
            yield _damage(commit_path(seq), f"its epoch {body.get('run_epoch')} has no record")
        for ref in manifest.segments(body):
            known = refs.setdefault(ref.path, ref)
            if known.size != ref.size:
                yield _damage(commit_path(seq), f"names {ref.path} with another size")
        if part := manifest.log_part(body):
            parts[part.path] = part


def _verify_segments(root: Root, refs: dict[str, SegmentRef], *, quick: bool) -> Iterator[Problem]:
    stored = set(_stored_segments(root))
    for path in sorted(refs.keys() | stored):
        if path not in stored:
            yield _damage(path, f"missing, named as {refs[path].name!r}")
            continue
        if quick and path in refs:
            yield from _verify_reference(root, refs[path], quick=True)
            continue
        try:
            size = root.size(path)
            data = root.read(path, size)
        except CorruptError as error:
            yield _damage(path, error)
            continue
        digest = hashlib.sha256(data).hexdigest()
        named = _SEGMENT.fullmatch(path.rpartition("/")[2])
        if named is None or named[1] != digest or path.split("/")[2] != digest[:2]:
            yield _damage(path, f"its sha256 is {digest}")
        elif path in refs and size != refs[path].size:
            yield _damage(path, f"has {size} bytes, not {refs[path].size}")
        elif path not in refs:
            yield _note(path, "orphan")


def _verify_log_parts(log: RunLog, parts: dict[str, LogRef], *, quick: bool) -> Iterator[Problem]:
    names = [name for name in log.root.names("log") if manifest.LOG_FILE.fullmatch(name)]
    for path in sorted({f"log/{name}" for name in names} - parts.keys()):
        yield _note(path, "orphan")
    for part in parts.values():
        yield from _verify_reference(log.root, part, quick=quick)


def _stored_segments(root: Root) -> Iterator[str]:
    for fanout in root.names("segments/sha256"):
        if _FANOUT.fullmatch(fanout):
            folder = f"segments/sha256/{fanout}"
            names = root.names(folder)
            yield from (f"{folder}/{name}" for name in names if _SEGMENT.fullmatch(name))


def _verify_names(root: Root) -> Iterator[Problem]:
    """Note what an interrupted writer or somebody else left between our objects."""
    fanouts = [name for name in root.names("segments/sha256") if _FANOUT.fullmatch(name)]
    allowed: dict[str, re.Pattern[str]] = {
        "": re.compile("|".join(re.escape(name) for name in sorted(_TOP))),
        "epochs": objects.EPOCH_NAME,
        "commits": objects.COMMIT_NAME,
        "log": manifest.LOG_FILE,
        "pins": pins.PIN_FILE,
        "segments": re.compile("sha256"),
        "segments/sha256": _FANOUT,
        **{f"segments/sha256/{fanout}": _SEGMENT for fanout in fanouts},
    }
    for folder, pattern in allowed.items():
        prefix = f"{folder}/" if folder else ""
        for name in root.leftovers(folder):
            yield _note(prefix + name, "a temporary file of an interrupted writer")
        for name in root.names(folder):
            if not pattern.fullmatch(name):
                yield _note(prefix + name, "not an object of this format")
