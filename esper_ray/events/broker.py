"""Who gets which event, and when again: the rules of a bus over plain memory, time handed in."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from esper_ray.errors import BusError

DEAD = ".dead"
"""Ending of the run under which events lie that were refused too often; no run is named so."""


@dataclass(frozen=True, slots=True)
class Retention:
    """What is kept for groups to come, and how patient a bus is with consumers.

    Kept are the newest `events` that are no older than `age_s`. An event that was handed out
    `deliveries` times in vain is dead. A consumer that has not called for `lease_s` is gone, and
    what it held is handed to another; a group without a consumer for `age_s` is forgotten.
    """

    events: int = 65_536
    age_s: float = 86_400.0
    deliveries: int = 5
    lease_s: float = 30.0

    def __post_init__(self) -> None:
        if min(self.events, self.deliveries) < 1 or min(self.age_s, self.lease_s) <= 0:
            raise ValueError(f"{self} keeps nothing")


class Record(NamedTuple):
    """An encoded event, and what a bus has to know of it."""

    id: str
    run: str
    layer: str
    shard: int
    data: bytes


class Group(NamedTuple):
    """Who consumes together: each event of `run`, or of one layer of it, goes to one of them."""

    name: str
    run: str
    layer: str | None


@dataclass(slots=True)
class _Lane:
    """The events of one (layer, shard) that a group has not acknowledged, in order.

    The first `handed` are with `owner`: one consumer at a time, so that order holds.
    """

    pending: deque[Record] = field(default_factory=deque)
    acked: set[str] = field(default_factory=set)
    failures: dict[str, int] = field(default_factory=dict)
    handed: int = 0
    owner: str = ""
    not_before: float = 0.0

    def hand(self, consumer: str, room: int) -> Iterator[Record]:
        """The next events, which are with `consumer` from now on."""
        while room > 0 and self.handed < len(self.pending):
            record = self.pending[self.handed]
            self.handed, self.owner = self.handed + 1, consumer
            if record.id not in self.acked:
                room -= 1
                yield record

    def ack(self, record_id: str) -> None:
        """Forget an event, in whatever order they are done with."""
        self.acked.add(record_id)
        while self.pending and self.pending[0].id in self.acked:
            self._drop_first()
        if self.handed == 0:
            self.owner = ""

    def take_back(self, position: int, not_before: float) -> None:
        """Hand the event at `position` and all after it out again."""
        self.handed, self.not_before = position, not_before
        if position == 0:
            self.owner = ""

    def fail(self, position: int) -> int:
        """Count one delivery in vain; how many there were."""
        record_id = self.pending[position].id
        self.failures[record_id] = self.failures.get(record_id, 0) + 1
        return self.failures[record_id]

    def add(self, record: Record, most: int) -> int:
        """Queue an event; how many older ones had to give way."""
        self.pending.append(record)
        if len(self.pending) <= most:
            return 0
        self._drop_first()
        return 1

    def _drop_first(self) -> None:
        first = self.pending.popleft()
        self.acked.discard(first.id)
        self.failures.pop(first.id, None)
        self.handed = max(0, self.handed - 1)


@dataclass(slots=True)
class _Members:
    lanes: dict[tuple[str, int], _Lane] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=dict)  # consumer -> when it called last
    left: set[str] = field(default_factory=set)
    called: float = 0.0


@dataclass(slots=True)
class _Kept:
    """The newest events of a run, for groups that come later and to know a repeat by."""

    records: deque[tuple[float, Record]] = field(default_factory=deque)
    ids: set[str] = field(default_factory=set)
    gone: int = 0


class Broker:
    """Keeps events and hands them out. Every `now` is in seconds of one clock that never falls."""

    def __init__(self, retention: Retention) -> None:
        self.retention = retention
        self.lost = 0
        """Events that a group did not get because it was too far behind."""
        self._kept: dict[str, _Kept] = {}
        self._groups: dict[Group, _Members] = {}

    def publish(self, records: Iterable[Record], now: float) -> int:
        """Take events; those that are kept already are repeats, and nothing happens. How many."""
        taken = 0
        for record in records:
            kept = self._kept.setdefault(record.run, _Kept())
            if record.id in kept.ids:
                continue
            kept.records.append((now, record))
            kept.ids.add(record.id)
            self._expire(kept, now)
            taken += 1
            for group, members in self._groups.items():
                if _meant(group, record):
                    self._queue(members, record)
        return taken

    def has_all(self, run: str) -> bool:
        """Whether every event of a run that was published is still kept."""
        return run not in self._kept or self._kept[run].gone == 0

    def join(self, group: Group, start: str, older: Sequence[Record], now: float) -> None:
        """Make a group, unless it is there; it begins with the `new`, the `earliest`, or after an
        id, which BusError says is unknown. `older` are events from before those that are kept.
        """
        self._forget(now)
        if group in self._groups:
            return
        kept = self._kept.setdefault(group.run, _Kept())
        known = [r for r in older if r.id not in kept.ids] + [r for _, r in kept.records]
        if start == "new":
            known = []
        elif start != "earliest":
            ids = [record.id for record in known]
            if start not in ids:
                raise BusError(
                    f"no event {start[:200]!r} is kept", "start with `earliest`, or with `new`"
                )
            known = known[ids.index(start) + 1 :]
        members = self._groups[group] = _Members(called=now)
        for record in known:
            if _meant(group, record):
                self._queue(members, record)

    def fetch(self, group: Group, consumer: str, room: int, now: float) -> list[Record]:
        """The next events for a consumer, those of a layer and shard in order. BusError where the
        group is unknown: it was forgotten, or this is another broker than it joined.
        """
        members = self._members(group)
        if consumer in members.left:  # a call that was under way when it left
            return []
        members.called = members.seen[consumer] = now
        self._release(members, now)
        found: list[Record] = []
        for lane in members.lanes.values():
            if lane.owner in ("", consumer) and lane.not_before <= now:
                found += lane.hand(consumer, room - len(found))
        return found

    def ack(self, group: Group, consumer: str, record: Record, now: float) -> None:
        """An event is done with; where the consumer has lost it to another, nothing happens."""
        if (held := self._held(group, consumer, record, now)) is not None:
            held[0].ack(record.id)

    def nack(self, group: Group, consumer: str, record: Record, delay_s: float, now: float) -> None:
        """Hand an event, and what follows it in its lane, out again after a delay."""
        if (held := self._held(group, consumer, record, now)) is not None:
            lane, position = held
            lane.take_back(position, now + delay_s)
            self._count_failure(lane, position, now)

    def leave(self, group: Group, consumer: str, now: float) -> None:
        """A consumer goes: what it holds is handed to others at once, and no failure is counted."""
        if group in self._groups:
            members = self._groups[group]
            members.called = now
            members.seen.pop(consumer, None)
            members.left.add(consumer)
            for lane in members.lanes.values():
                if lane.owner == consumer:
                    lane.take_back(0, 0.0)

    # ---- inside ---------------------------------------------------------------------------------

    def _members(self, group: Group) -> _Members:
        if group not in self._groups:
            raise BusError(f"the group {group.name!r} is not known here", "subscribe again")
        return self._groups[group]

    def _held(
        self, group: Group, consumer: str, record: Record, now: float
    ) -> tuple[_Lane, int] | None:
        """The lane and position of an event, where the consumer is the one that holds it."""
        members = self._members(group)
        members.called = members.seen[consumer] = now
        lane = members.lanes.get((record.layer, record.shard))
        if lane is None or lane.owner != consumer:
            return None
        held = (i for i in range(lane.handed) if lane.pending[i].id == record.id)
        position = next(held, None)
        return None if position is None else (lane, position)

    def _queue(self, members: _Members, record: Record) -> None:
        lane = members.lanes.setdefault((record.layer, record.shard), _Lane())
        self.lost += lane.add(record, self.retention.events)

    def _release(self, members: _Members, now: float) -> None:
        """Take back what consumers hold that have not called for long."""
        late = now - self.retention.lease_s
        gone = {name for name, called in members.seen.items() if called < late}
        for name in gone:
            del members.seen[name]
        for lane in members.lanes.values():
            if lane.owner in gone:
                # The first is the one that it was at work on.
                lane.take_back(0, 0.0)
                self._count_failure(lane, 0, now)

    def _count_failure(self, lane: _Lane, position: int, now: float) -> None:
        if lane.fail(position) >= self.retention.deliveries:
            record = lane.pending[position]
            lane.ack(record.id)
            lane.not_before = 0.0
            if not record.run.endswith(DEAD):
                self.publish([record._replace(run=record.run + DEAD)], now)

    def _expire(self, kept: _Kept, now: float) -> None:
        oldest = now - self.retention.age_s
        while len(kept.records) > self.retention.events or kept.records[0][0] < oldest:
            kept.ids.discard(kept.records.popleft()[1].id)
            kept.gone += 1

    def _forget(self, now: float) -> None:
        oldest = now - self.retention.age_s
        for group in [g for g, members in self._groups.items() if members.called < oldest]:
            del self._groups[group]


def _meant(group: Group, record: Record) -> bool:
    return group.run == record.run and group.layer in (None, record.layer)
