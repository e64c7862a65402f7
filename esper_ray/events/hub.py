"""A broker that is waited for: one object in a process, or an actor, and the bus in front of it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
import time
from collections import deque
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from esper_ray.errors import BusError
from esper_ray.events import cloud
from esper_ray.events.broker import Broker, Group, Record, Retention
from esper_ray.events.bus import Start
from esper_ray.events.event import Event

_ROOM = 256
_WAIT_S = 10.0
_LOOK_S = 0.1  # how often a waiting consumer looks for leases and delays that have ended


class HubPort(Protocol):
    """How a bus reaches a hub; every call may raise BusError."""

    def publish(self, records: Sequence[Record]) -> Awaitable[Any]:
        """Take events."""
        ...

    def join(self, group: Group, start: str) -> Awaitable[Any]:
        """Make a group; it is in place before what is published after this call was made."""
        ...

    def fetch(self, group: Group, consumer: str, room: int, wait_s: float) -> Awaitable[Any]:
        """Up to `room` records, as soon as there is one, or none after `wait_s`."""
        ...

    def ack(self, group: Group, consumer: str, record: Record) -> Awaitable[Any]:
        """An event is done with."""
        ...

    def nack(self, group: Group, consumer: str, record: Record, delay_s: float) -> Awaitable[Any]:
        """An event is to be handed out again."""
        ...

    def leave(self, group: Group, consumer: str) -> Awaitable[Any]:
        """A consumer goes."""
        ...


class Hub:
    """A broker behind a lock; consumers in other threads, with loops of their own, are woken."""

    def __init__(self, retention: Retention | None = None) -> None:
        self._broker = Broker(retention or Retention())
        self._lock = threading.Lock()
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    async def publish(self, records: Sequence[Record]) -> int:
        """See HubPort."""
        with self._lock:
            taken = self._broker.publish(records, time.monotonic())
        self._wake()
        return taken

    async def join(self, group: Group, start: str) -> None:
        """See HubPort."""
        self.add_group(group, start, ())

    def add_group(self, group: Group, start: str, older: Sequence[Record]) -> None:
        """Make a group that also gets `older` events; see Broker.join."""
        with self._lock:
            self._broker.join(group, start, older, time.monotonic())

    def has_all(self, run: str) -> bool:
        """Whether no event of a run was published that is not kept."""
        with self._lock:
            return self._broker.has_all(run)

    async def fetch(self, group: Group, consumer: str, room: int, wait_s: float) -> list[Record]:
        """See HubPort."""
        deadline = time.monotonic() + wait_s
        waiting = (asyncio.get_running_loop(), asyncio.Event())
        self._waiting.add(waiting)
        try:
            while True:
                waiting[1].clear()
                with self._lock:
                    found = self._broker.fetch(group, consumer, room, time.monotonic())
                left = deadline - time.monotonic()
                if found or left <= 0:
                    return found
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(waiting[1].wait(), min(left, _LOOK_S))
        finally:
            self._waiting.discard(waiting)

    async def ack(self, group: Group, consumer: str, record: Record) -> None:
        """See HubPort."""
        with self._lock:
            self._broker.ack(group, consumer, record, time.monotonic())

    async def nack(self, group: Group, consumer: str, record: Record, delay_s: float) -> None:
        """See HubPort."""
        with self._lock:
            self._broker.nack(group, consumer, record, delay_s, time.monotonic())
        self._wake()

    async def leave(self, group: Group, consumer: str) -> None:
        """See HubPort."""
        with self._lock:
            self._broker.leave(group, consumer, time.monotonic())
        self._wake()

    def _wake(self) -> None:
        for loop, event in list(self._waiting):
            with contextlib.suppress(RuntimeError):  # its loop has ended, and so has its wait
                loop.call_soon_threadsafe(event.set)


def record(event: Event) -> Record:
    """An event as a broker keeps it; EventRefused if no reader would take it."""
    return Record(event.id, event.run, event.layer, event.shard, cloud.encode(event))


class HubBus:
    """The EventBus in front of a hub."""

    def __init__(self, hub: HubPort) -> None:
        self._hub = hub
        self._open: list[HubDeliveries] = []
        self._closed = False

    async def publish(self, events: Sequence[Event]) -> None:
        """See EventBus."""
        self._check()
        if records := [record(event) for event in events]:
            await self._hub.publish(records)

    def subscribe(
        self, *, group: str, run: str, layer: str | None = None, start: Start = "new"
    ) -> HubDeliveries:
        """See EventBus."""
        self._check()
        deliveries = HubDeliveries(self._hub, Group(group, run, layer), start)
        self._open.append(deliveries)
        return deliveries

    async def close(self) -> None:
        """See EventBus."""
        self._closed = True
        while self._open:
            await self._open.pop().aclose()

    def _check(self) -> None:
        if self._closed:
            raise BusError("this bus is closed", "connect again")


@dataclass(frozen=True, slots=True)
class HubDelivery:
    """See Delivery."""

    event: Event
    record: Record
    source: HubDeliveries

    async def ack(self) -> None:
        """See Delivery."""
        await self.source.ack(self.record)

    async def nack(self, delay_s: float = 0.0) -> None:
        """See Delivery."""
        await self.source.nack(self.record, delay_s)


class HubDeliveries:
    """See Deliveries. Fetches several events at a time."""

    def __init__(self, hub: HubPort, group: Group, start: str) -> None:
        self._hub, self._group = hub, group
        self._consumer = secrets.token_hex(8)
        self._joining: Awaitable[Any] | None = _started(hub.join(group, start))
        self._fetched: deque[Record] = deque()
        self._fetching: asyncio.Future[list[Record]] | None = None
        self._closed = False

    def __aiter__(self) -> HubDeliveries:
        return self

    async def __anext__(self) -> HubDelivery:
        if self._joining is not None:
            joining, self._joining = self._joining, None
            await joining
        while not self._fetched:
            if self._closed:
                raise StopAsyncIteration
            if self._fetching is None:
                asked = self._hub.fetch(self._group, self._consumer, _ROOM, _WAIT_S)
                self._fetching = asyncio.ensure_future(asked)
            # Who gives up waiting does not lose what is on its way: it comes with the next wait.
            fetching = self._fetching
            try:
                self._fetched += await asyncio.shield(fetching)
            finally:
                if fetching.done():
                    self._fetching = None
        fetched = self._fetched.popleft()
        return HubDelivery(cloud.decode(fetched.data), fetched, self)

    async def ack(self, done: Record) -> None:
        """See Delivery."""
        await self._hub.ack(self._group, self._consumer, done)

    async def nack(self, refused: Record, delay_s: float) -> None:
        """See Delivery. What was fetched after it comes again after it."""
        lane = refused.layer, refused.shard
        self._fetched = deque(r for r in self._fetched if (r.layer, r.shard) != lane)
        await self._hub.nack(self._group, self._consumer, refused, delay_s)

    async def aclose(self) -> None:
        """See Deliveries."""
        if not self._closed:
            self._closed = True
            self._fetched.clear()
            if self._fetching is not None:
                self._fetching.cancel()
            if self._joining is not None:
                joining, self._joining = self._joining, None
                await joining
            await self._hub.leave(self._group, self._consumer)


class _Done:
    """What there is left to wait for once a coroutine has run to its end: its failure, if any."""

    def __init__(self, failure: Exception | None) -> None:
        self._failure = failure

    def __await__(self) -> Any:
        if self._failure is not None:
            raise self._failure
        yield from ()


def _started(joining: Awaitable[Any]) -> Awaitable[Any]:
    """The same, begun: a coroutine that never waits has then run to its end."""
    if not asyncio.iscoroutine(joining):
        return joining  # a call to another process is on its way
    try:
        joining.send(None)
    except StopIteration:
        return _Done(None)
    except BusError as error:
        return _Done(error)
    raise RuntimeError("joining a hub of this process does not wait")
