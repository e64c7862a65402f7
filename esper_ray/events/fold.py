"""What counts of the events of a run, however often and in whatever order they came."""

from __future__ import annotations

from collections.abc import Iterable

from esper_ray.events.event import Event, Kind

_STARTS = (Kind.STARTED, Kind.REWOUND)


def current(events: Iterable[Event]) -> list[Event]:
    """Each event once, without those that a rewind has superseded, in their order.

    A rewind names the last sequence number that it kept; what earlier run epochs told after it
    does not count any more.
    """
    known = {event.id: event for event in events}
    rewinds = [
        (event.run_epoch, int(event.data["kept_sequence"]))
        for event in known.values()
        if event.kind in _STARTS and isinstance(event.data, dict)
    ]
    return sorted(
        (
            event
            for event in known.values()
            if not any(event.run_epoch < epoch and event.sequence > kept for epoch, kept in rewinds)
        ),
        key=_place,
    )


def _place(event: Event) -> tuple[int, int, str, int, int]:
    return event.run_epoch, event.sequence, event.layer, event.shard, event.seed_id or 0
