"""Tells the world what a coordinator has done: events on the bus, values of metrics."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from esper_ray.actors.event_feed import DAMAGED, EventFeed
from esper_ray.actors.event_hub import EventSettings
from esper_ray.actors.journal import Journal
from esper_ray.actors.metrics import MetricsHub, rim_here
from esper_ray.actors.publisher import Publisher
from esper_ray.events.messages import EpochReport, StageReport
from esper_ray.storage import EpochRecord, Root, RunLog

_LOGGER = logging.getLogger("esper_ray.events")


@dataclass(frozen=True, slots=True)
class HeraldSpec:
    """What the world is told about: a run by its name, and where its events go.

    `damaged` are commits that this start has passed over, with what is wrong with them.
    """

    events: EventSettings = field(default_factory=EventSettings)
    damaged: Mapping[int, str] = field(default_factory=dict)


class Herald:
    """One per coordinator. Nothing that it does holds training up."""

    def __init__(self, spec: HeraldSpec, root: Root) -> None:
        self._spec, self._root = spec, root
        self._publisher: Publisher | None = None
        self._metrics = MetricsHub(rim_here(), spec.events.run)
        self._since = time.monotonic()

    async def start(self, journal: Journal, epoch: EpochRecord) -> None:
        """Note what this start found damaged, and go on publishing where an earlier one ended.

        May be called again, for a later run epoch.
        """
        for commit, problem in sorted(self._spec.damaged.items()):
            journal.fault(DAMAGED, problem, commit=commit)
        self._metrics.started(epoch.run_epoch)
        if self._publisher is not None:
            await self._publisher.close(0.0)  # what it had not published, the next one has to
        events = self._spec.events
        if events.bus:
            feed = EventFeed(RunLog(self._root), events.run)
            self._publisher = Publisher.open(events, feed, _LOGGER.warning)
            await self._publisher.start(epoch)

    def arrived(self, reports: Sequence[StageReport]) -> None:
        """The stages have reported their epoch: its steps lie between the boundary and now."""
        self._metrics.steps(time.monotonic() - self._since, len(reports[-1].losses))

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around a commit."""
        began = time.monotonic()
        yield
        self._metrics.saved(time.monotonic() - began)

    async def boundary(self, report: EpochReport, *, last: bool) -> None:
        """An epoch has ended, and what it committed is stored; at the last one, all goes out."""
        if self._publisher is not None and report.commit is not None:
            self._publisher.wake()
        if self._publisher is not None and last:
            await self._publisher.close()
        backlog = 0 if self._publisher is None else self._publisher.backlog
        self._metrics.epoch(report, backlog)
        self._since = time.monotonic()

    def stored(self) -> dict[str, int]:
        """What a commit says of it: how far the events are published."""
        return {} if self._publisher is None else {"published": self._publisher.position}
