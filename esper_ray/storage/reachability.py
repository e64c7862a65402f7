"""What is stored below a root, what names it, and what nothing that stays would reach."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from esper_ray.storage import gc_log, manifest, objects, pins
from esper_ray.storage.commit_log import EpochRecord, RunLog, leading_to, lineage
from esper_ray.storage.filesystem import Root
from esper_ray.storage.manifest import LogRef

FANOUT = re.compile(r"[0-9a-f]{2}")
SEGMENT = re.compile(r"([0-9a-f]{64})\.(?:arrow|safetensors)")
LAYER_KEY = re.compile(r"[0-9a-f]{16}")
_EPOCH = re.compile(r"e[0-9]{8}")
_SHARD = re.compile(r"s[0-9]{4}")


@dataclass(frozen=True, slots=True)
class Survey:
    """Everything that was found below a root, at one time or a little later."""

    epochs: Sequence[EpochRecord]
    commits: dict[int, frozenset[str]]
    """Paths that each stored commit names."""
    parts: dict[int, LogRef | None]
    """Part of the event log of each commit, those of deleted commits too."""
    pinned: frozenset[int]
    layer_refs: frozenset[str]
    objects: frozenset[str]
    """Paths of all segments and log parts."""

    @property
    def history(self) -> list[int]:
        """Commits of the current history that are still stored, newest first."""
        return lineage(self.epochs, self.commits)

    def reached(self, live: Collection[int]) -> set[str]:
        """Paths that stay if these commits do: also the event logs of all that led to them."""
        paths = set(self.layer_refs).union(*(self.commits[seq] for seq in live))
        told = set(lineage(self.epochs, self.parts))
        for seq in set(live) - told:
            told |= set(lineage(leading_to(seq, self.epochs), self.parts))
        return paths | {part.path for seq in told if (part := self.parts[seq])}


def survey(root: Root) -> Survey:
    """Look at everything; CorruptError if a manifest cannot be read: what it names is unknown."""
    log = RunLog(root)
    # First what may be deleted, then what names it: a commit made meanwhile is seen.
    stored = frozenset([*stored_segments(root), *stored_parts(root)])
    layer_refs = frozenset(
        ref.path
        for path in layer_manifests(root)
        for ref in manifest.segments(objects.read_manifest(root, path))
    )
    parts = gc_log.pruned_parts(root)
    commits: dict[int, frozenset[str]] = {}
    for seq in log.commit_numbers():
        body = log.read_commit(seq)
        commits[seq] = frozenset(ref.path for ref in manifest.references(body))
        parts[seq] = manifest.log_part(body)
    pinned = frozenset(pin.seq for pin in pins.pins(root))
    return Survey(log.epochs(), commits, parts, pinned, layer_refs, stored)


def stored_segments(root: Root) -> Iterator[str]:
    """Paths of all segments; other names are left out."""
    for fanout in root.names("segments/sha256"):
        if FANOUT.fullmatch(fanout):
            folder = f"segments/sha256/{fanout}"
            yield from (f"{folder}/{n}" for n in root.names(folder) if SEGMENT.fullmatch(n))


def stored_parts(root: Root) -> Iterator[str]:
    """Paths of all parts of the event log; other names are left out."""
    return (f"log/{name}" for name in root.names("log") if manifest.LOG_FILE.fullmatch(name))


def layer_manifests(root: Root) -> Iterator[str]:
    """Paths of the manifests of all layers' logs, by layer, epoch, shard and number."""
    for folder, inside in layer_folders(root):
        if inside is objects.COMMIT_NAME:
            yield from (f"{folder}/{n}" for n in root.names(folder) if inside.fullmatch(n))


def layer_folders(root: Root) -> Iterator[tuple[str, re.Pattern[str]]]:
    """Folders of all layers, their epochs and shards, each with the names that belong there."""
    for layer in _folders(root, "layers", LAYER_KEY):
        yield layer, _EPOCH
        for epoch in _folders(root, layer, _EPOCH):
            yield epoch, _SHARD
            for shard in _folders(root, epoch, _SHARD):
                yield shard, objects.COMMIT_NAME


def _folders(root: Root, folder: str, pattern: re.Pattern[str]) -> Iterator[str]:
    return (f"{folder}/{name}" for name in root.names(folder) if pattern.fullmatch(name))
