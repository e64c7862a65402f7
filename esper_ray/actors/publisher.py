"""Publishes what a run has committed; its log is the queue, so nothing waits and none is lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from esper_ray.actors.event_feed import Entry, EventFeed
from esper_ray.actors.event_hub import EventSettings
from esper_ray.errors import BusError, CheckpointNotFound, CorruptError, StorageUnavailable
from esper_ray.events import memory_bus  # noqa: F401 - it registers memory://
from esper_ray.events.bus import connect
from esper_ray.events.outbox import Outbox, WhenFull
from esper_ray.storage import EpochRecord

_PAUSE_S = (0.2, 10.0)
CLOSE_S = 10.0
"""How long the end of a run waits for the bus."""
_LATER = (BusError, CheckpointNotFound, CorruptError, StorageUnavailable)


class Publisher:
    """A position in the log of a run, and a task that moves it on; training waits for neither."""

    def __init__(self, outbox: Outbox, feed: EventFeed, warn: Callable[[str], None]) -> None:
        self._outbox, self._feed, self._warn = outbox, feed, warn
        self._awake = asyncio.Event()
        self._idle = asyncio.Event()
        self._done: set[Entry] = set()
        self._task: asyncio.Task[None] | None = None
        self.backlog = 0
        """Commits and starts that are stored and not published yet, when last looked at."""
        self.position = 0
        """The last commit that was published with all before it; it goes into every commit."""
        self.trouble = ""
        """Why the bus does not take events at present."""

    @classmethod
    def open(
        cls, settings: EventSettings, feed: EventFeed, warn: Callable[[str], None]
    ) -> Publisher:
        """On the bus that the settings name; ConfigError for one that is unknown."""
        return cls(Outbox(connect(settings.bus)), feed, warn)

    async def start(self, epoch: EpochRecord) -> None:
        """Go on after what an earlier start had published, as this start's resumed commit says."""
        self._done = await asyncio.to_thread(self._published, epoch)
        self.position = max((entry.commit for entry in self._done), default=0)
        self.wake()

    def wake(self) -> None:
        """Something was committed, or the run was started anew; returns at once."""
        self._awake.set()
        self._idle.clear()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work())

    async def close(self, timeout_s: float = CLOSE_S) -> bool:
        """Publish what is left, as long as it takes no longer than this; whether all went out."""
        if self._task is None:
            return True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            self._warn(
                f"{self.backlog} commits are not published yet ({self.trouble}); "
                "`esper-ray events tail` has them, and the next start publishes them"
            )
        finally:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            with contextlib.suppress(BusError):
                await self._outbox.bus.close()
            self._task = None
        return self._idle.is_set()

    def _published(self, epoch: EpochRecord) -> set[Entry]:
        """What an earlier start published; all before this one, where it says nothing of it."""
        earlier = [entry for entry in self._feed.history() if entry.run_epoch < epoch.run_epoch]
        if epoch.resumed_from is None:
            return set(earlier)
        position = self._feed.published(epoch.resumed_from)
        if position is None:
            return set(earlier)
        told = [at for at, entry in enumerate(earlier) if 0 < entry.commit <= position]
        return set(earlier[: told[-1] + 1]) if told else set()

    async def _work(self) -> None:
        pause, longest = _PAUSE_S
        while True:
            await self._awake.wait()
            self._awake.clear()
            try:
                await self._catch_up()
            except _LATER as error:
                if not self.trouble:  # one warning, however often it is tried
                    self._warn(f"events are not published: {error}; they stay in the log")
                self.trouble = str(error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, longest)
                self._awake.set()
                continue
            if self.trouble:
                self._warn("events are published again")
            self.trouble, pause = "", _PAUSE_S[0]
            if not self._awake.is_set():
                self._idle.set()

    async def _catch_up(self) -> None:
        history = await asyncio.to_thread(self._feed.history)
        left = [entry for entry in history if entry not in self._done]
        for number, entry in enumerate(left):
            self.backlog = len(left) - number
            await self._publish(entry)
            self._done.add(entry)
            self.position = max(self.position, entry.commit)
        self.backlog = 0

    async def _publish(self, entry: Entry) -> None:
        events = await asyncio.to_thread(self._feed.events, entry)
        await self._outbox.flush()  # what the bus has not accepted before
        while events:
            taken = await self._outbox.put(events, WhenFull.SPILL)
            events = events[taken:]
            await self._outbox.flush()
