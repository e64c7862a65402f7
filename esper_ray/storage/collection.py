"""Retention and garbage collection: mark, wait for the grace, look again, delete."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from esper_ray.errors import ConfigError
from esper_ray.storage import gc_log, objects
from esper_ray.storage.filesystem import Root
from esper_ray.storage.objects import commit_path
from esper_ray.storage.reachability import Survey, survey
from esper_ray.storage.retention import Retention, kept

GRACE_S: Final = 24 * 3600.0
MIN_GRACE_S: Final = 2 * objects.REUSE_S
"""The shortest grace, in seconds, beside which a writer may be at work."""
_MOST = 20_000  # names in one record, which has at most 16 MiB


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What one pass kept, newly marked and deleted; a dry run says what it would have."""

    kept: tuple[int, ...]
    marked: tuple[str, ...]
    waiting: tuple[str, ...]
    """Marked earlier, and still inside the grace."""
    deleted: tuple[str, ...]
    bytes_deleted: int


def prune(
    root: Root,
    policy: Retention,
    grace_s: float = GRACE_S,
    *,
    alone: bool = False,
    dry_run: bool = False,
) -> PruneReport:
    """Delete what was marked `grace_s` seconds ago or more, then mark what nothing kept reaches.

    Nothing is marked or deleted that was written within the grace, and no name that is not ours.
    ConfigError for a grace beside which no writer is safe, unless the caller says that it is
    `alone`; CorruptError, and nothing deleted, while a manifest cannot be read.
    """
    if grace_s < MIN_GRACE_S and not alone:
        raise ConfigError(
            f"a grace of {grace_s / 3600:g} h could delete what a running writer is about to name",
            f"use at least {MIN_GRACE_S / 3600:g} h, or --alone if no run writes there",
        )
    objects.check_format(root)
    seen = survey(root)
    condemned = _condemned(root)
    loose = _loose(seen, policy)
    stamps = _stamps(root, loose, gc_log.now() - grace_s)
    due = {
        path: stamp
        for path, stamp in stamps.items()
        if (entry := condemned.get(path)) and entry[0] == stamp and _passed(entry[1], grace_s)
    }
    new = {p: s for p, s in stamps.items() if p not in condemned or condemned[p][0] != s}
    waiting = tuple(sorted(stamps.keys() - due.keys() - new.keys()))
    deleted: dict[str, int] = {}
    if dry_run:
        deleted = {path: root.size(path) for path in _going(root, seen, policy, due)[1]}
    else:
        deleted = _sweep(root, seen, policy, due)
        for batch in _batches(new):
            gc_log.append(root, "mark", paths=batch)
    return PruneReport(
        kept=tuple(sorted(_kept(seen, policy))),
        marked=tuple(sorted(new)),
        waiting=waiting,
        deleted=tuple(deleted),
        bytes_deleted=sum(deleted.values()),
    )


def _kept(seen: Survey, policy: Retention) -> set[int]:
    return kept(seen.history, seen.commits, seen.pinned, policy)


def _loose(seen: Survey, policy: Retention) -> list[str]:
    """Paths that could go: commits that are not kept, oldest first, then what only they reach."""
    live = _kept(seen, policy)
    commits = [commit_path(seq) for seq in sorted(seen.commits) if seq not in live]
    return [*commits, *sorted(seen.objects - seen.reached(live))]


def _condemned(root: Root) -> dict[str, tuple[float, float]]:
    """Marked paths: when each was last changed, and when it was first marked as such."""
    found: dict[str, tuple[float, float]] = {}
    for record in gc_log.records(root):
        if record.kind != "mark":
            continue
        marked = root.modified(gc_log.gc_path(record.seq))
        for path, stamp in record.paths.items():
            if path not in found or found[path][0] != stamp:
                found[path] = (stamp, marked)
    return found


def _passed(marked: float, grace_s: float) -> bool:
    return gc_log.now() - marked >= grace_s


def _stamps(root: Root, paths: Iterable[str], latest: float) -> dict[str, float]:
    """When each path was last changed, in the given order; younger and absent ones left out."""
    found = {}
    for path in paths:
        stamp = _modified(root, path)
        if stamp is not None and stamp <= latest:
            found[path] = stamp
    return found


def _modified(root: Root, path: str) -> float | None:
    try:
        return root.modified(path)
    except FileNotFoundError:
        return None  # another collector was faster


def _batches(paths: Mapping[str, float]) -> list[dict[str, float]]:
    items = list(paths.items())
    return [dict(items[i : i + _MOST]) for i in range(0, len(items), _MOST)]


def _going(
    root: Root, seen: Survey, policy: Retention, due: Mapping[str, float]
) -> tuple[list[int], list[str]]:
    """Which commits can go now, and all paths with them: commits first, the oldest of them first.

    A commit that stays, whatever the reason, keeps what it names.
    """
    live = _kept(seen, policy)
    unchanged = [
        seq
        for seq in sorted(seen.commits)
        if (stamp := due.get(commit_path(seq))) is not None
        and seq not in live
        and _modified(root, commit_path(seq)) == stamp
    ]
    reached = seen.reached(set(seen.commits) - set(unchanged))
    loose = sorted(path for path in seen.objects - reached if path in due)
    return unchanged, [*map(commit_path, unchanged), *loose]


def _sweep(root: Root, seen: Survey, policy: Retention, due: Mapping[str, float]) -> dict[str, int]:
    """Announce a sweep, look once more at what is reachable, delete the rest; bytes by path."""
    began = time.monotonic()
    commits, paths = _going(root, seen, policy, due)
    paths = paths[:_MOST]
    if not paths:
        return {}
    told = [(seq, seen.parts[seq]) for seq in commits if commit_path(seq) in paths]
    number = gc_log.append(
        root,
        "sweep",
        paths=dict.fromkeys(paths, 0.0),
        commits=[{"seq": seq, "log": part and part.to_json()} for seq, part in told],
    )
    # What was committed, pinned or resumed before that record is seen now; whoever comes later
    # sees the record, and waits for the sweep to end.
    named = {path: due[path] for path in paths}
    _, paths = _going(root, survey(root), policy, named)
    deleted: dict[str, int] = {}
    for path in paths:
        if time.monotonic() - began > gc_log.SWEEP_S:
            break  # a writer waits no longer than this: the next pass goes on
        if _modified(root, path) == named[path]:
            size = root.size(path)
            root.remove(path)
            deleted[path] = size
    gc_log.append(root, "done", sweep=number)
    return deleted
