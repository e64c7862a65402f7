"""A run on a cluster publishes what it commits on a hub, and the hub knows the run's log."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from esper_ray.actors.event_feed import EventFeed
from esper_ray.actors.event_hub import EventSettings, open_hub, start_hub
from esper_ray.config import RunConfig
from esper_ray.events.bus import connect
from esper_ray.events.event import Event, Kind
from esper_ray.runtime import Runtime
from esper_ray.storage import RunLog

HUB = "of-a-run"
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


@pytest.mark.usefixtures("interrupts")
@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.timeout(300)  # a run, and a process of its own, on a machine that may be busy
def test_run_on_a_cluster_publishes_all_that_it_commits(
    make_config: ConfigMaker, ray_cluster: str
) -> None:
    hub = start_hub(HUB)  # the run finds it, and it outlives the run
    config = make_config(
        cluster__address=ray_cluster,
        train__epochs=5,
        storage__every_epochs=2,
        events__bus=f"ray://{HUB}",
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
    found = asyncio.run(heard(f"ray://{HUB}", config.run, len(stored)))
    assert by_layer(found) == by_layer(stored)
    # A hub that has seen nothing tells the same from the log.
    fresh = open_hub(EventSettings("ray://late", config.run), root)
    assert by_layer(asyncio.run(heard("ray://late", config.run, len(stored)))) == by_layer(stored)
    assert_tail_hears(f"ray://{HUB}", ray_cluster, root.url, stored[-1])
    del hub, fresh


def by_layer(events: list[Event]) -> dict[str, list[Event]]:
    """Order is promised within a layer only."""
    return {event.layer: [e for e in events if e.layer == event.layer] for event in events}


def assert_tail_hears(bus: str, address: str, url: str, last: Event) -> None:
    """`events tail --bus` prints what is stored, then what is published, and ends by Ctrl-C."""
    words = ["events", "tail", url, "--follow", "--bus", bus, "--address", address]
    process = subprocess.Popen(
        [sys.executable, "-m", "esper_ray", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.endswith(f"checkpoint {last.data['commit']} committed\n"):  # type: ignore[index]
                break
        data = {**dict.fromkeys(("seed_id", "commit", "epoch", "step"), -1), "cause": "NEWS"}
        news = replace(last, kind=Kind.FAULT, sequence=999, data={**data, "about": "went well"})
        asyncio.run(connect(bus).publish([news]))
        assert process.stdout.readline().endswith("news: went well\n")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        assert (process.returncode, stderr.strip()) == (130, "error: interrupted")
    finally:
        watchdog.cancel()
        process.kill()
        process.wait(10)
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()
