"""What a publisher has not got rid of yet: bounded, in order, with a rule for when it is full."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from enum import StrEnum

from esper_ray.errors import BusError
from esper_ray.events.bus import EventBus
from esper_ray.events.event import Event

_AT_ONCE = 512


class WhenFull(StrEnum):
    """What happens to events that the outbox has no room for."""

    BLOCK = "block"
    """Wait until a flush has made room."""
    SPILL = "spill"
    """Take what fits; the rest stays with the caller, who has it in a log."""
    FAIL = "fail"
    """Raise BusError, and take none."""
    DROP_OLDEST = "drop"
    """Drop the oldest of those that were put in under this rule, and count them."""


class Outbox:
    """Events on their way to a bus; at most `capacity` of them."""

    def __init__(self, bus: EventBus, capacity: int = 1024) -> None:
        if capacity < 1:
            raise ValueError(f"an outbox holds at least one event, not {capacity}")
        self.bus, self.capacity = bus, capacity
        self.dropped = 0
        """Events that were dropped for want of room."""
        self._queue: deque[tuple[Event, bool]] = deque()
        self._changed = asyncio.Condition()
        self._flushing = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._queue)

    async def put(self, events: Sequence[Event], when_full: WhenFull) -> int:
        """Queue events for the next flush; how many were taken, from the first on."""
        if when_full is WhenFull.FAIL and len(self) + len(events) > self.capacity:
            raise BusError(
                f"{len(self)} events wait for the bus, and there is no room for {len(events)} more"
            )
        for taken, event in enumerate(events):
            if len(self) >= self.capacity:
                if when_full is WhenFull.SPILL:
                    return taken
                if when_full is WhenFull.BLOCK:
                    async with self._changed:
                        await self._changed.wait_for(lambda: len(self) < self.capacity)
                elif not self._drop_oldest():
                    self.dropped += 1  # only events that must not be dropped wait
                    continue
            self._queue.append((event, when_full is WhenFull.DROP_OLDEST))
        return len(events)

    async def flush(self) -> None:
        """Publish what waits, in order; BusError says why the rest stays."""
        async with self._flushing:
            while self._queue:
                some = [event for event, _ in list(self._queue)[:_AT_ONCE]]
                await self.bus.publish(some)
                done = {id(event) for event in some}
                self._queue = deque(item for item in self._queue if id(item[0]) not in done)
                async with self._changed:
                    self._changed.notify_all()

    async def close(self, timeout_s: float) -> None:
        """Flush within the time, then close the bus; TimeoutError or BusError where it cannot."""
        try:
            await asyncio.wait_for(self.flush(), timeout_s)
        finally:
            await self.bus.close()

    def _drop_oldest(self) -> bool:
        for position, (_, droppable) in enumerate(self._queue):
            if droppable:
                del self._queue[position]
                self.dropped += 1
                return True
        return False
