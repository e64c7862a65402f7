"""Pins: names that people give to commits, created once; what a pin names is never collected."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from esper_ray.errors import CheckpointNotFound, ConfigError, CorruptError
from esper_ray.storage import gc_log, manifest, objects
from esper_ray.storage.commit_log import RunLog
from esper_ray.storage.filesystem import Root
from esper_ray.storage.replica import Replica
from esper_ray.storage.sources import Sources

PIN_NAME = re.compile(r"[a-z0-9-]{1,64}")
PIN_FILE = re.compile(r"[a-z0-9-]{1,64}\.json")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_RESERVED = "latest"


@dataclass(frozen=True, slots=True)
class Pin:
    """One name of one commit, and the sha256 of that commit's manifest."""

    name: str
    seq: int
    step: int
    sha256: str

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Pin:
        """Read a record that nobody vouches for; CorruptError unless every field is right."""
        found = cls(*(body.get(name) for name in cls.__slots__))  # type: ignore[arg-type]
        counts = all(type(number) is int and number >= 0 for number in (found.seq, found.step))
        texts = all(type(text) is str for text in (found.name, found.sha256))
        if body.get("kind") != "pin" or not counts or not texts:
            raise CorruptError("it is no record of a pin")
        if not _DIGEST.fullmatch(found.sha256):
            raise CorruptError("it names no sha256")
        return found


def pin_path(name: str) -> str:
    """Where a pin lies below the storage prefix."""
    return f"pins/{name}.json"


def check_name(name: str) -> None:
    """Raise ConfigError unless a pin may be called so."""
    if not PIN_NAME.fullmatch(name) or name == _RESERVED:
        raise ConfigError(
            f"{name[:80]!r} cannot be the name of a pin",
            "use 1 to 64 of a-z, 0-9 and -, but not `latest`",
        )


def pin(root: Root, name: str, seq: int) -> Pin:
    """Name commit `seq`, once; ConfigError if the name is another commit's already."""
    check_name(name)
    body = RunLog(root).read_commit(seq)
    stored = root.read(objects.commit_path(seq), manifest.MAX_BYTES)
    digest = hashlib.sha256(stored).hexdigest()
    made = Pin(name, seq, int(body.get("step", 0)), digest)
    fields = {key: getattr(made, key) for key in Pin.__slots__}
    seen = max(gc_log.record_numbers(root), default=0)
    record = {**objects.header("pin", int(body["run_epoch"])), **fields}
    try:
        root.create(pin_path(name), manifest.encode(record))
    except FileExistsError as error:
        there = read_pin(root, name)
        if there != made:
            raise ConfigError(
                f"{root.url} has a pin {name!r} already, of step {there.step}",
                f"use another name, or run `esper-ray checkpoints unpin {root.url} {name}` first",
            ) from error
    if gc_log.await_sweeps(root, objects.commit_path(seq), seen):
        try:
            RunLog(root).read_commit(seq)
        except CheckpointNotFound:
            root.remove(pin_path(name))
            raise
    return made


def unpin(root: Root, name: str) -> None:
    """Take a name away; what it named stays until a prune. CheckpointNotFound if there is none."""
    check_name(name)
    if pin_path(name).rpartition("/")[2] not in root.names("pins"):
        raise _unknown(root, name)
    root.remove(pin_path(name))


def read_pin(root: Root, name: str) -> Pin:
    """The pin of that name; CheckpointNotFound names those that exist, CorruptError if damaged."""
    return _read_pin(Sources([root]), name)


def _read_pin(sources: Sources, name: str) -> Pin:
    def check(body: dict[str, Any], where: str) -> Pin:
        found = Pin.from_json(body)
        if found.name != name:
            raise CorruptError(f"{where} is the record of pin {found.name!r}")
        return found

    try:
        return sources.read_record(pin_path(name), check)
    except FileNotFoundError as error:
        raise _unknown(sources.roots[-1], name) from error


def pin_names(root: Root) -> list[str]:
    """Names of all pins, sorted."""
    found = root.names("pins")
    return [name.removesuffix(".json") for name in found if PIN_FILE.fullmatch(name)]


def pins(root: Root) -> list[Pin]:
    """All pins, by name; CorruptError if one is damaged."""
    return [read_pin(root, name) for name in pin_names(root)]


def pinned_commit(log: RunLog, name: str) -> int:
    """The commit that a pin names; CorruptError unless it is the very one that was pinned."""
    found = _read_pin(log.sources, name)
    path = objects.commit_path(found.seq)

    def check(place: Replica) -> None:
        data = place.read(path, manifest.MAX_BYTES)
        if hashlib.sha256(data).hexdigest() != found.sha256:
            raise CorruptError(f"{place.url}/{path} is not the commit that was pinned as {name!r}")

    try:
        log.sources.first(path, check)
    except FileNotFoundError as error:
        raise CorruptError(f"{log.root.url}/{path}, pinned as {name!r}, is missing") from error
    return found.seq


def _unknown(root: Root, name: str) -> CheckpointNotFound:
    known = ", ".join(pin_names(root)[:8])
    return CheckpointNotFound(
        f"no pin {name!r} at {root.url}: it has {known or 'none'}",
        "use @latest, @step=N or one of these",
    )
