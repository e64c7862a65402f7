"""What every event bus promises, shown on each adapter."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from esper_ray.errors import BusError, CorruptError, EventRefused, TooNewError
from esper_ray.events import cloud
from esper_ray.events.broker import Retention
from esper_ray.events.bus import EventBus, connect
from esper_ray.events.event import Event, Kind
from esper_ray.events.hub import Hub, HubBus, record
from esper_ray.events.log import EventKind, Events
from esper_ray.events.outbox import Outbox, WhenFull

LAYERS = ("a", "b.c", "Ebene ü/1", "层.%2E")
RUN = ["digits"]
"""The run of the present test; all tests share a hub of the cluster."""
PATIENCE = Retention(events=20_000, deliveries=3, lease_s=0.5)


def event(sequence: int, layer: str = "a", **given: Any) -> Event:
    values: dict[str, Any] = {
        "kind": Kind.FAULT,
        "run": RUN[0],
        "layer": layer,
        "run_epoch": 1,
        "sequence": sequence,
        "time": "2026-11-26T01:02:03.000004Z",
        "data": {"n": sequence},
    }
    return Event(**{**values, **given})


def batch(sequence: int, layer: str, rows: int, **given: Any) -> Event:
    columns = {
        "seed_id": np.arange(rows),
        "generation": 1,
        "from_state": 2,
        "to_state": 3,
        "cause": "POLICY",
        "strategy": 1,
        "blueprint_id": 4,
        "checkpoint_id": 5,
        "alpha": 0.25,
        "gate": "",
    }
    data = Events.build(EventKind.TRANSITION, layer, sequence, 6, 7, rows, **{**columns, **given})
    return event(sequence, layer, kind=Kind.TRANSITION, data=data)


KEPT: list[Any] = []  # handles; an actor ends with the last one


@dataclass(frozen=True)
class Place:
    """Makes buses that meet."""

    connect: Callable[[], EventBus]


@pytest.fixture(scope="session")
def ray_hub(ray_cluster: str) -> str:
    """URL of an event hub of the tests' cluster; it may be slow to start on a busy machine."""
    import ray

    from esper_ray.actors.event_hub import start_hub

    hub = start_hub("events-for-tests", PATIENCE)
    ray.get(hub.submit("ping"), timeout=100)
    KEPT.append(hub)
    return "ray://events-for-tests"


@pytest.fixture(params=["memory", pytest.param("ray", marks=pytest.mark.ray)])
def place(request: pytest.FixtureRequest) -> Place:
    RUN[0] = f"digits-{secrets.token_hex(4)}"
    if request.param == "memory":
        hub = Hub(PATIENCE)
        return Place(lambda: HubBus(hub))
    url = request.getfixturevalue("ray_hub")
    return Place(lambda: connect(url))


async def take(source: AsyncIterator[Any], count: int, *, ack: bool = True) -> list[Event]:
    found = []
    for _ in range(count):
        delivery = await asyncio.wait_for(anext(source), 20)
        if ack:
            await delivery.ack()
        found.append(delivery.event)
    return found


async def nothing(source: AsyncIterator[Any], wait_s: float = 0.3) -> bool:
    waiting = asyncio.ensure_future(anext(source))
    done, _ = await asyncio.wait([waiting], timeout=wait_s)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    return not done


def numbers(events: list[Event], layer: str) -> list[int]:
    return [e.sequence for e in events if e.layer == layer]


# ------------------------------------------------------------------ what is delivered


async def test_events_of_a_layer_come_in_order_and_with_their_types(place: Place) -> None:
    bus = place.connect()
    source = bus.subscribe(group="g", run=RUN[0])
    sent = [
        event(i, layer, data={"n": i, "x": 0.1, "none": None, "flag": True, "l": [1, "ü"]})
        for i in range(1, 6)
        for layer in LAYERS
    ]
    sent += [batch(9, LAYERS[2], 3, score=np.array([np.nan, np.inf, 0.1]))]
    await bus.publish(sent[:7])
    await bus.publish(sent[7:])
    found = await take(source, len(sent))
    assert {e.id for e in found} == {e.id for e in sent}
    for layer in LAYERS:
        assert [e for e in found if e.layer == layer] == [e for e in sent if e.layer == layer]
    assert await nothing(source)
    await bus.close()


async def test_one_layer_is_subscribed_to_by_its_name(place: Place) -> None:
    bus = place.connect()
    sources = {layer: bus.subscribe(group="g", run=RUN[0], layer=layer) for layer in LAYERS}
    await bus.publish([event(i, layer) for i in (1, 2) for layer in LAYERS])
    await bus.publish([event(1, LAYERS[0], run="other")])
    for layer, source in sources.items():
        assert [e.layer for e in await take(source, 2)] == [layer] * 2
        assert await nothing(source, 0.05)
    await bus.close()


async def test_refused_event_comes_again_before_what_follows_it(place: Place) -> None:
    bus = place.connect()
    source = bus.subscribe(group="g", run=RUN[0])
    await bus.publish([event(1), event(2), event(3)])
    first = await anext(source)
    await first.nack(0.2)
    assert numbers(await take(source, 3), "a") == [1, 2, 3]
    assert await nothing(source)
    await bus.close()


async def test_what_a_lost_consumer_held_goes_to_another_of_its_group(place: Place) -> None:
    bus, other = place.connect(), place.connect()
    lost = bus.subscribe(group="g", run=RUN[0])
    await bus.publish([event(i) for i in range(1, 5)])
    assert numbers(await take(lost, 1), "a") == [1]
    assert numbers(await take(lost, 2, ack=False), "a") == [2, 3]  # and is never heard of again
    assert numbers(await take(other.subscribe(group="g", run=RUN[0]), 3), "a") == [2, 3, 4]
    await other.close()


async def test_consumer_that_leaves_gives_back_what_it_held(place: Place) -> None:
    bus, other = place.connect(), place.connect()
    left = bus.subscribe(group="g", run=RUN[0])
    await bus.publish([event(1), event(2)])
    await take(left, 1, ack=False)
    await bus.close()
    with pytest.raises(StopAsyncIteration):
        await anext(left)
    assert numbers(await take(other.subscribe(group="g", run=RUN[0]), 2), "a") == [1, 2]
    await other.close()


async def test_every_group_gets_every_event(place: Place) -> None:
    bus = place.connect()
    sources = [bus.subscribe(group=name, run=RUN[0]) for name in ("one", "two")]
    await bus.publish([event(i) for i in range(1, 4)])
    for source in sources:
        assert numbers(await take(source, 3), "a") == [1, 2, 3]
    await bus.close()


async def test_two_consumers_of_a_group_share_what_there_is(place: Place) -> None:
    bus = place.connect()
    sources = [bus.subscribe(group="g", run=RUN[0]) for _ in range(2)]
    await bus.publish([event(1, "a"), event(2, "a")])
    one = await take(sources[0], 1, ack=False)
    await bus.publish([event(3, "a"), event(1, "b")])  # layer a is with the first consumer
    assert [e.layer for e in await take(sources[1], 1)] == ["b"]
    assert numbers(one, "a") == [1]
    await bus.close()


@pytest.mark.parametrize(
    ("start", "found"), [("earliest", [1, 2, 3, 4]), ("new", [4]), ("second", [3, 4])]
)
async def test_group_begins_where_it_asks_to(place: Place, start: str, found: list[int]) -> None:
    bus = place.connect()
    await bus.publish([event(1), event(2), event(3)])
    start = event(2).id if start == "second" else start
    source = bus.subscribe(group="g", run=RUN[0], start=start)
    await bus.publish([event(4)])
    assert numbers(await take(source, len(found)), "a") == found
    assert await nothing(source, 0.05)
    again = place.connect().subscribe(group="g", run=RUN[0], start="earliest")
    await bus.publish([event(5)])
    assert numbers(await take(again, 1), "a") == [5]  # a group that exists goes on
    await bus.close()


async def test_group_cannot_begin_at_an_event_that_is_not_kept(place: Place) -> None:
    bus = place.connect()
    with pytest.raises(BusError, match="is kept"):
        await anext(bus.subscribe(group="g", run=RUN[0], start="digits/a/0/1/0/77"))


# ------------------------------------------------------------------ what is published


async def test_event_that_is_published_again_has_one_effect(place: Place) -> None:
    bus = place.connect()
    source = bus.subscribe(group="g", run=RUN[0])
    for _ in range(3):
        await bus.publish([event(1), event(2)])
        await place.connect().publish([event(2)])
    assert numbers(await take(source, 2), "a") == [1, 2]
    assert await nothing(source)
    await bus.close()


async def test_same_number_of_a_new_incarnation_or_run_epoch_is_another_event(place: Place) -> None:
    bus = place.connect()
    source = bus.subscribe(group="g", run=RUN[0])
    sent = [event(1), event(1, incarnation=1), event(1, run_epoch=2), event(1, shard=1)]
    await bus.publish(sent)
    assert {e.id for e in await take(source, 4)} == {e.id for e in sent}
    await bus.close()


async def test_ten_thousand_transitions_in_batches(place: Place) -> None:
    bus = place.connect()
    source = bus.subscribe(group="g", run=RUN[0])
    sent = [batch(i + 1, LAYERS[i % 4], 50) for i in range(200)]
    for at in range(0, 200, 20):
        await bus.publish(sent[at : at + 20])
    found = await take(source, 200)
    assert sum(len(e.data) for e in found) == 10_000
    for layer in LAYERS:
        assert [e for e in found if e.layer == layer] == [e for e in sent if e.layer == layer]
    await bus.close()


async def test_event_that_is_refused_too_often_is_dead_and_kept_apart(place: Place) -> None:
    bus = place.connect()
    source = bus.subscribe(group="g", run=RUN[0])
    await bus.publish([event(1), event(2)])
    for _ in range(PATIENCE.deliveries):
        delivery = await asyncio.wait_for(anext(source), 10)
        assert delivery.event.sequence == 1
        await delivery.nack()
    assert numbers(await take(source, 1), "a") == [2]
    dead = bus.subscribe(group="g", run=f"{RUN[0]}.dead", start="earliest")
    assert await take(dead, 1) == [event(1)]
    assert await nothing(source)
    await bus.close()


@pytest.mark.parametrize(
    "refused",
    [
        event(1, data={"text": "x" * cloud.MAX_BYTES}),
        event(1, data={"nan": float("nan")}),
        event(1, data={1: "a number as key"}),
        event(1, data={"tuple": (1, 2)}),
        event(1, run="No Name"),
        event(-1),
        batch(1, "a", cloud.MAX_ROWS + 1),
    ],
    ids=lambda e: f"{str(e.data)[:12]}-{e.run[:2]}-{e.sequence}",
)
async def test_event_that_no_reader_would_take_is_refused_whole(
    place: Place, refused: Event
) -> None:
    bus = place.connect()
    source = bus.subscribe(group="g", run=RUN[0])
    with pytest.raises(EventRefused):
        await bus.publish([event(1, "b"), refused])
    await bus.publish([event(2, "b")])
    assert numbers(await take(source, 1), "b") == [2]
    await bus.close()


async def test_event_of_an_unknown_version_is_not_taken_for_another(place: Place) -> None:
    known = record(event(1))
    told = json.loads(known.data)
    told["type"] = told["type"].replace(".v1", ".v2")
    newer = known._replace(data=json.dumps(told).encode())
    bus = place.connect()
    source = bus.subscribe(group="g", run=RUN[0])
    await bus._hub.publish([newer])  # type: ignore[attr-defined]
    with pytest.raises(TooNewError, match="not known here"):
        await anext(source)
    with pytest.raises(CorruptError, match="larger than"):
        cloud.decode(b" " * (cloud.MAX_BYTES + 1))
    await bus.close()


# ------------------------------------------------------------------ the outbox in front of it


async def outbox_of(place: Place, capacity: int) -> tuple[Outbox, AsyncIterator[Any]]:
    bus = place.connect()
    return Outbox(bus, capacity), place.connect().subscribe(group="g", run=RUN[0])


async def test_full_outbox_blocks_until_a_flush(place: Place) -> None:
    outbox, source = await outbox_of(place, 2)
    putting = asyncio.create_task(outbox.put([event(i) for i in (1, 2, 3)], WhenFull.BLOCK))
    await asyncio.sleep(0.05)
    assert (putting.done(), len(outbox)) == (False, 2)
    await outbox.flush()
    assert await putting == 3
    await outbox.close(5)
    assert numbers(await take(source, 3), "a") == [1, 2, 3]


async def test_full_outbox_leaves_the_rest_to_the_log(place: Place) -> None:
    outbox, source = await outbox_of(place, 2)
    assert await outbox.put([event(i) for i in (1, 2, 3)], WhenFull.SPILL) == 2
    await outbox.flush()
    assert await outbox.put([event(3)], WhenFull.SPILL) == 1
    await outbox.close(5)
    assert numbers(await take(source, 3), "a") == [1, 2, 3]


async def test_full_outbox_fails_and_takes_none(place: Place) -> None:
    outbox, source = await outbox_of(place, 2)
    await outbox.put([event(1)], WhenFull.FAIL)
    with pytest.raises(BusError, match="no room for 2 more"):
        await outbox.put([event(2), event(3)], WhenFull.FAIL)
    await outbox.close(5)
    assert numbers(await take(source, 1), "a") == [1]
    assert await nothing(source)


async def test_full_outbox_drops_the_oldest_telemetry_and_no_transition(place: Place) -> None:
    outbox, source = await outbox_of(place, 3)
    await outbox.put([event(1)], WhenFull.SPILL)
    await outbox.put([event(i) for i in (2, 3, 4)], WhenFull.DROP_OLDEST)
    assert (outbox.dropped, len(outbox)) == (1, 3)
    await outbox.close(5)
    assert numbers(await take(source, 3), "a") == [1, 3, 4]


async def test_closing_flushes_and_a_closed_bus_takes_nothing(place: Place) -> None:
    outbox, source = await outbox_of(place, 8)
    await outbox.put([event(1), event(2)], WhenFull.BLOCK)
    await outbox.close(5)
    assert numbers(await take(source, 2), "a") == [1, 2]
    for late in (outbox.bus.publish([event(3)]), _subscribed(outbox.bus)):
        with pytest.raises(BusError, match="closed"):
            await late


async def _subscribed(bus: EventBus) -> None:
    bus.subscribe(group="g", run=RUN[0])
