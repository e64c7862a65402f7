"""Events of a run as its storage tells them, and how they reach a bus."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from esper_ray.actors.event_feed import Entry, EventFeed
from esper_ray.actors.event_hub import EventSettings
from esper_ray.actors.herald import HeraldSpec
from esper_ray.actors.publisher import Publisher
from esper_ray.errors import BusError
from esper_ray.events.bus import connect
from esper_ray.events.event import Event, Kind
from esper_ray.events.fold import current
from esper_ray.events.log import EventKind, Events
from esper_ray.events.outbox import Outbox
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.storage import Root, RunLog
from tests.actors.coordination import build, logged, report, run_epoch
from tests.builders import telemetry


@dataclass
class Bus:
    """An EventBus that keeps what it takes, and takes nothing while it is down."""

    down: bool = False
    told: list[Event] = field(default_factory=list)
    closed: bool = False

    async def publish(self, events: Sequence[Event]) -> None:
        if self.down:
            raise BusError("it is down")
        self.told += events

    def subscribe(self, **_: object) -> Any:
        raise NotImplementedError

    async def close(self) -> None:
        self.closed = True


def told(root: Root, *, superseded: bool = False) -> list[Event]:
    feed = EventFeed(RunLog(root), "fake")
    return [e for entry in feed.history(superseded=superseded) for e in feed.events(entry)]


def publisher(root: Root, bus: Bus, said: list[str] | None = None) -> Publisher:
    feed = EventFeed(RunLog(root), "fake")
    return Publisher(Outbox(bus, 2), feed, (said if said is not None else []).append)


async def one_epoch(
    root: Root,
    states: Sequence[S] = (S.DORMANT,) * 2,
    resumed_from: int | None = None,
    **given: Any,
) -> Any:
    progress = None
    if resumed_from is not None:
        progress = RunLog(root).read_commit(resumed_from)["coordinator"]
    manifest = {"run": "fake", "config": {"seed": 1}, "config_digest": "0"}
    coordinator, layers, record = await build(
        root, progress, resumed_from, every_epochs=1, manifest=manifest, **given
    )
    await run_epoch(coordinator, report(0, telemetry(states, epochs=1)))
    return coordinator, layers, record


async def test_feed_tells_every_applied_transition_once_and_in_order(root: Root) -> None:
    await one_epoch(root)
    started, moved, committed = told(root)
    assert (started.kind, moved.kind, committed.kind) == (
        Kind.STARTED,
        Kind.TRANSITION,
        Kind.COMMITTED,
    )
    applied = logged(root, EventKind.TRANSITION)
    assert isinstance(moved.data, Events)
    assert moved.data.columns["seed_id"].tolist() == applied.columns["seed_id"].tolist()
    assert [e.id for e in told(root)] == ["fake//0/1/0/0", "fake/layer/0/1/0/2", "fake//0/1/0/3"]
    assert isinstance(committed.data, dict)
    assert (committed.data["commit"], committed.data["transitions"]) == (1, 2)
    assert told(root) == told(root)


async def test_rewind_names_what_it_superseded_and_leaves_it_out(root: Root) -> None:
    await one_epoch(root)
    await one_epoch(root, [S.GERMINATED] * 2, resumed_from=1)
    await one_epoch(root, [S.GERMINATED] * 2, resumed_from=1)  # back over commit 2
    history = EventFeed(RunLog(root), "fake").history()
    assert history == [Entry(1, 0), Entry(1, 1), Entry(3, 0), Entry(3, 3)]
    rewound = next(e for e in told(root) if e.kind is Kind.REWOUND)
    assert isinstance(rewound.data, dict)
    assert rewound.data["superseded"] == {"first": 2, "last": 2}
    everything = told(root, superseded=True)
    assert len(everything) > len(told(root))
    assert {e.id for e in current(everything) if e.kind is Kind.TRANSITION} == {
        e.id for e in told(root) if e.kind is Kind.TRANSITION
    }


async def test_fold_is_the_same_however_events_came(root: Root) -> None:
    await one_epoch(root)
    await one_epoch(root, [S.GERMINATED] * 2, resumed_from=1)
    await one_epoch(root, [S.GERMINATED] * 2, resumed_from=1)
    events = told(root, superseded=True)
    folded = current(events)
    for seed in range(20):
        order = np.random.default_rng(seed).integers(0, len(events), 3 * len(events))
        came = [*(events[i] for i in order), *events]
        assert current(came) == folded


async def test_damaged_checkpoint_is_told_once_the_next_commit_is(root: Root) -> None:
    await one_epoch(root)
    herald = HeraldSpec(damaged={2: "a segment is missing"})
    await one_epoch(root, [S.GERMINATED] * 2, resumed_from=1, herald=herald)
    [damaged] = [e for e in told(root) if e.kind is Kind.DAMAGED]
    assert isinstance(damaged.data, dict)
    assert (damaged.data["commit"], damaged.data["about"]) == (2, "a segment is missing")
    assert (damaged.layer, damaged.run_epoch) == ("", 2)


async def test_all_that_is_committed_is_published(root: Root) -> None:
    _, _, record = await one_epoch(root)
    bus = Bus()
    sender = publisher(root, bus)
    await sender.start(record)
    assert await sender.close()
    assert bus.told == told(root)
    assert (sender.position, sender.backlog, bus.closed) == (1, 0, True)


async def test_publishing_waits_for_a_bus_that_is_down_and_says_so_once(root: Root) -> None:
    _, _, record = await one_epoch(root)
    bus, said = Bus(down=True), list[str]()
    sender = publisher(root, bus, said)
    await sender.start(record)
    await asyncio.sleep(0.5)
    assert (sender.position, len(said)) == (0, 1)
    assert "stay in the log" in said[0]
    bus.down = False
    assert await sender.close(5)
    assert {e.id for e in bus.told} == {e.id for e in told(root)}
    assert said[1:] == ["events are published again"]


async def test_end_of_a_run_does_not_wait_for_ever(root: Root) -> None:
    _, _, record = await one_epoch(root)
    said: list[str] = []
    sender = publisher(root, Bus(down=True), said)
    await sender.start(record)
    assert not await sender.close(0.3)
    assert "`esper-ray events tail` has them" in said[-1]


async def test_what_a_crash_left_unpublished_is_published_by_the_next_start(root: Root) -> None:
    settings = EventSettings("memory://crashed", "fake")
    bus = connect(settings.bus)
    deliveries = bus.subscribe(group="g", run="fake")
    coordinator, *_ = await one_epoch(root, herald=HeraldSpec(settings))
    coordinator._herald._publisher._task.cancel()  # as if killed between log and publish
    assert RunLog(root).read_commit(1)["published"] == 0
    coordinator, *_ = await one_epoch(
        root, [S.GERMINATED] * 2, resumed_from=1, herald=HeraldSpec(settings)
    )
    assert await coordinator._herald._publisher.close(5)
    events = []
    for _ in told(root):
        delivery = await asyncio.wait_for(anext(deliveries), 5)
        events.append(delivery.event)
        await delivery.ack()
    assert {e.id for e in events} == {e.id for e in told(root)}
    await bus.close()


async def test_training_does_not_wait_for_a_bus_that_is_down(root: Root) -> None:
    settings = EventSettings("ray://nobody-is-there", "fake")
    coordinator, *_ = await one_epoch(root, herald=HeraldSpec(settings))
    assert RunLog(root).read_commit(1)["published"] == 0
    await asyncio.sleep(0.2)
    trouble = coordinator._herald._publisher.trouble
    assert "needs Ray" in trouble or "no event hub is named" in trouble  # by who used Ray before
    assert not await coordinator._herald._publisher.close(0.1)


@pytest.mark.parametrize("url", ["redis://x", "memory", "nats://y", ""])
def test_unknown_bus_is_refused_with_those_that_are_known(url: str) -> None:
    from esper_ray.errors import ConfigError

    with pytest.raises(ConfigError) as refusal:
        connect(url)
    assert "memory://, ray://" in refusal.value.hint
