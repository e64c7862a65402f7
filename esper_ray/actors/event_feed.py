"""What a run has committed, as events: made from its storage alone, so always the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from esper_ray.actors.run_point import RunPoint
from esper_ray.errors import CorruptError
from esper_ray.events import cloud
from esper_ray.events import log as event_log
from esper_ray.events.event import Event, Kind
from esper_ray.events.log import EventKind, Events, parse_gate
from esper_ray.storage import EpochRecord, LogRef, RunLog, gc_log, manifest, objects
from esper_ray.storage.commit_log import chain

_MOVES = (EventKind.TRANSITION, EventKind.REPLANT)
DAMAGED: Final = "DAMAGED"
"""Cause of a FAULT in the log that means a commit was passed over."""


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """A commit of a run, or with `commit` 0 the start of a run epoch."""

    run_epoch: int
    commit: int


class EventFeed:
    """Reads the history of a run; `log` is nobody's writer."""

    def __init__(self, log: RunLog, run: str) -> None:
        self._log, self._run = log, run
        self._kept: dict[int, int] = {}

    def history(self, *, superseded: bool = False) -> list[Entry]:
        """The present history in order, or with what rewinds have superseded, too."""
        epochs = self._log.epochs()
        numbers = {*self._log.commit_numbers(), *gc_log.pruned_parts(self._log.root)}
        steps = list(chain(epochs))[::-1]
        if superseded:
            after: list[int | None] = [epoch.next_seq - 1 for epoch in epochs[1:]]
            steps = list(zip(epochs, [*after, None], strict=True))
        return [
            entry
            for epoch, last in steps
            for entry in [
                Entry(epoch.run_epoch, 0),
                *(
                    Entry(epoch.run_epoch, seq)
                    for seq in sorted(numbers)
                    if epoch.next_seq <= seq and (last is None or seq <= last)
                ),
            ]
        ]

    def events(self, entry: Entry) -> list[Event]:
        """What one entry tells; CorruptError where its objects are damaged."""
        return [self._start(entry)] if not entry.commit else list(self._committed(entry))

    def published(self, commit: int) -> int | None:
        """The last commit that was published when `commit` was made, None if it does not say."""
        value = self._log.read_commit(commit).get("published")
        return value if type(value) is int else None

    # ---- starts ---------------------------------------------------------------------------------

    def _start(self, entry: Entry) -> Event:
        epoch = self._log.read_epoch(entry.run_epoch)
        body = self._log.sources.read_record(
            objects.epoch_path(entry.run_epoch), lambda found, _: found
        )
        kept = self._kept_sequence(epoch)
        first, last = (epoch.resumed_from or 0) + 1, epoch.next_seq - 1
        rewound = first <= last
        data = {
            "resumed_from": epoch.resumed_from,
            "source": epoch.source,
            "kept_sequence": kept,
            "superseded": {"first": first, "last": last} if rewound else None,
        }
        kind = Kind.REWOUND if rewound else Kind.STARTED
        return Event(kind, self._run, "", entry.run_epoch, kept, _time(body.get("time")), data)

    def _kept_sequence(self, epoch: EpochRecord) -> int:
        """The last sequence number that a start kept; that of a pruned commit is in the log."""
        commit = epoch.resumed_from
        if commit is None:
            return 0
        if commit not in self._kept:
            if commit in self._log.commit_numbers():
                body = self._log.read_commit(commit)
                self._kept[commit] = RunPoint.from_json(body).progress.sequence
            else:
                ref = gc_log.pruned_parts(self._log.root).get(commit)
                told = [0] if ref is None else self._read(ref).columns["sequence"].tolist()
                self._kept[commit] = max(told, default=0)
        return self._kept[commit]

    # ---- commits --------------------------------------------------------------------------------

    def _committed(self, entry: Entry) -> Iterator[Event]:
        pruned = gc_log.pruned_parts(self._log.root)
        if entry.commit in pruned and entry.commit not in self._log.commit_numbers():
            ref, point = pruned[entry.commit], None
            time = self._start(Entry(entry.run_epoch, 0)).time  # its own went with its manifest
        else:
            body = self._log.read_commit(entry.commit)
            ref, point = manifest.log_part(body), RunPoint.from_json(body)
            time = _time(point.time)
        rows = Events.empty() if ref is None else self._read(ref)
        yield from self._told(entry, rows, time)
        if point is not None:
            data: dict[str, Any] = {
                "commit": entry.commit,
                "step": point.step,
                "epoch": point.epoch,
                "transitions": point.progress.transitions,
            }
            last = point.progress.sequence
            yield Event(Kind.COMMITTED, self._run, "", entry.run_epoch, last, time, data)

    def _told(self, entry: Entry, rows: Events, time: str) -> Iterator[Event]:
        kinds = rows.columns["kind"]
        rows = rows.take(np.isin(kinds, [*_MOVES, EventKind.FAULT]))
        sequence = rows.columns["sequence"]
        for group in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(sequence)) + 1):
            if not len(group):
                continue
            number, layer = int(sequence[group[0]]), rows.columns["layer"][group[0]]
            where = (self._run, layer, entry.run_epoch, number, time)
            if rows.columns["kind"][group[0]] == EventKind.FAULT:
                yield from (_fault(where, rows.take(group[i : i + 1])) for i in range(len(group)))
                continue
            for at in range(0, len(group), cloud.MAX_ROWS):
                part = rows.take(group[at : at + cloud.MAX_ROWS])
                seed = int(part.columns["seed_id"][0]) if len(group) > cloud.MAX_ROWS else None
                yield Event(Kind.TRANSITION, *where, _carried(part), seed_id=seed)

    def _read(self, ref: LogRef) -> Events:
        events = event_log.decode(self._log.read_log(ref))
        if len(events) != ref.rows:
            raise CorruptError(f"{self._log.root.url}/{ref.path} has {len(events)} rows")
        return events


def _carried(rows: Events) -> Events:
    """The same with the columns that a batch carries, so that both ends hold the same."""
    given = {name: rows.columns[name] for name in cloud.COLUMNS if name != "sequence"}
    columns, where = rows.columns, ("epoch", "step")
    rest = {name: values for name, values in given.items() if name not in where}
    return Events.build(
        columns["kind"],
        columns["layer"],
        columns["sequence"],
        columns["epoch"],
        columns["step"],
        len(rows),
        **rest,
    )


def _fault(where: tuple[str, str, int, int, str], row: Events) -> Event:
    values = {
        name: column[0] if isinstance(column, list) else column[0].item()
        for name, column in row.columns.items()
    }
    gate = parse_gate(values["gate"])
    data = {
        "cause": values["cause"],
        "about": gate["verdict"] if gate else "",
        "seed_id": values["seed_id"],
        "commit": values["checkpoint_id"],
        "epoch": values["epoch"],
        "step": values["step"],
    }
    kind = Kind.DAMAGED if values["cause"] == DAMAGED else Kind.FAULT
    return Event(kind, *where, data)


def _time(stored: object) -> str:
    return str(stored).replace("+00:00", "Z")
