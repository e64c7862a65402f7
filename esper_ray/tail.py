"""What happened in a run, as lines: from its storage, and on as more is committed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from esper_ray.actors.event_feed import Entry, EventFeed
from esper_ray.errors import ConfigError
from esper_ray.events import cloud
from esper_ray.events.bus import EventBus
from esper_ray.events.event import Event, Kind
from esper_ray.events.log import Events
from esper_ray.lifecycle import ExtendedLifecycle


@dataclass(frozen=True, slots=True)
class Choice:
    """Which events are shown: those of `layer`, and from `start` on, an id or `earliest`, `new`."""

    layer: str | None = None
    start: str = "earliest"
    superseded: bool = False


def stored_events(feed: EventFeed, choice: Choice, seen: set[Entry]) -> Iterator[Event]:
    """Each event of the run's history that is not in `seen` yet, one for each seed; adds to it."""
    for entry in feed.history(superseded=choice.superseded):
        if entry not in seen:
            seen.add(entry)
            for event in feed.events(entry):
                yield from singles(event)


def singles(event: Event) -> Iterator[Event]:
    """An event for each row of a batch, others as they are."""
    if isinstance(event.data, Events):
        yield from (cloud.single(event, row) for row in range(len(event.data)))
    else:
        yield event


def chosen(events: Iterable[Event], choice: Choice) -> Iterator[Event]:
    """Those of a layer and from the start on; what is about the whole run stays.

    ConfigError where the event to start after is not there.
    """
    began = choice.start == "earliest"
    for event in events:
        if began and event.layer in ("", choice.layer or event.layer):
            yield event
        began = began or event.id == choice.start
    if not began and choice.start != "new":
        raise ConfigError(
            f"no event of this run's history has the id {choice.start[:200]!r}",
            "give an id that `events tail --json` prints, `earliest` or `new`",
        )


def follow(
    feed: EventFeed,
    choice: Choice,
    seen: set[Entry],
    every_s: float,
    pause: Callable[[float], None] = time.sleep,
) -> Iterator[Event]:
    """What is committed from now on, without end; a rewind is told where it happens."""
    later = Choice(choice.layer, superseded=choice.superseded)
    while True:
        yield from chosen(stored_events(feed, later, seen), later)
        pause(every_s)


async def heard(
    bus: EventBus, run: str, choice: Choice, stored: Callable[[], Iterable[Event]], group: str
) -> AsyncIterator[Event]:
    """What is stored, then what comes by the bus, each event once."""
    deliveries = bus.subscribe(group=group, run=run, layer=None)
    told: set[str] = set()
    for event in await asyncio.to_thread(lambda: list(stored())):
        told.add(event.id)
        yield event
    later = Choice(choice.layer)
    async for delivery in deliveries:
        for event in chosen(singles(delivery.event), later):
            if event.id not in told:
                told.add(event.id)
                yield event
        await delivery.ack()


# ---- as text ------------------------------------------------------------------------------------


def as_json(event: Event) -> str:
    """One CloudEvent on one line."""
    return cloud.encode(event).decode()


def as_text(event: Event) -> str:
    """One line for people; stored text holds no escape sequence then."""
    data: Any = event.data
    match event.kind:
        case Kind.TRANSITION:
            names = [_state(data[name]) for name in ("from_state", "to_state")]
            gate = f"  {data['gate']['name']} gate" if data["gate"] else ""
            about = f"{event.layer}, seed {event.seed_id}: {' -> '.join(names)}  "
            about += f"{data['cause'].lower()}{gate}"
            where = f"epoch {data['epoch'] + 1:>4}  step {data['step']:>6}"
        case Kind.COMMITTED:
            where = f"epoch {data['epoch']:>4}  step {data['step']:>6}"
            about = f"checkpoint {data['commit']} committed"
        case Kind.STARTED | Kind.REWOUND:
            where = f"start {event.run_epoch:>4}"
            about = _start(event.kind, data)
        case _:
            where = f"start {event.run_epoch:>4}"
            name = f"checkpoint {data['commit']} " if event.kind is Kind.DAMAGED else ""
            about = f"{name}{data['cause'].lower()}: {data['about']}"
    line = f"{event.time[:19]}Z  {where:<25}  {about}"
    return "".join(character if character.isprintable() else "?" for character in line)


def _start(kind: Kind, data: Any) -> str:
    if data["resumed_from"] is None:
        begun = f"began from {data['source']}" if data["source"] else "began"
    else:
        begun = f"went on from checkpoint {data['resumed_from']}"
    if kind is Kind.STARTED:
        return f"run {begun}"
    gone = data["superseded"]
    return f"run {begun}; checkpoints {gone['first']} to {gone['last']} do not count any more"


def _state(code: int) -> str:
    known = {int(state): state.name for state in ExtendedLifecycle}
    return known.get(code, json.dumps(code))
