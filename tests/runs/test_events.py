"""A run on a cluster publishes what it commits on a hub, and the hub knows the run's log."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from esper_ray.actors.event_feed import EventFeed
from esper_ray.actors.event_hub import EventSettings, open_hub, start_hub
from esper_ray.config import RunConfig
from esper_ray.events.bus import connect
from esper_ray.events.event import Event
from esper_ray.runtime import Runtime
from esper_ray.storage import RunLog

ConfigMaker = Callable[..., RunConfig]


async def consume(source: Any, count: int) -> list[Event]:
    found = []
    for _ in range(count):
        delivery = await asyncio.wait_for(anext(source), 30)
        found.append(delivery.event)
        await delivery.ack()
    return found


async def heard(url: str, run: str, count: int) -> list[Event]:
    bus = connect(url)
    found = await consume(bus.subscribe(group="late", run=run, start="earliest"), count)
    await bus.close()
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_run_on_a_cluster_publishes_all_that_it_commits(
    make_config: ConfigMaker, ray_cluster: str
) -> None:
    hub = start_hub("of-a-run")  # the run finds it, and it outlives the run
    config = make_config(
        cluster__address=ray_cluster,
        train__epochs=8,
        storage__every_epochs=2,
        events__bus="ray://of-a-run",
    )
    with Runtime(config) as runtime:
        runtime.fit()
        root = runtime.root
    log = RunLog(root)
    feed = EventFeed(log, config.run)
    stored = [event for entry in feed.history() for event in feed.events(entry)]
    assert {"seed.transition", "checkpoint.committed"} <= {event.kind for event in stored}
    # By the commit before the last, what was committed before it had been published.
    assert log.read_commit(log.lineage()[0])["published"] > 0
    found = asyncio.run(heard("ray://of-a-run", config.run, len(stored)))
    assert {event.id for event in found} == {event.id for event in stored}
    for layer in {event.layer for event in stored}:
        assert [e for e in found if e.layer == layer] == [e for e in stored if e.layer == layer]
    # A hub that has seen nothing tells the same from the log.
    fresh = open_hub(EventSettings("ray://late", config.run), root)
    assert asyncio.run(heard("ray://late", config.run, len(stored))) == stored
    del hub, fresh
