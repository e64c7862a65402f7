"""Where the reports of stages wait until those of an epoch are complete."""

from __future__ import annotations

import asyncio

from esper_ray.actors.sharding import merged_reports
from esper_ray.errors import StepFailed
from esper_ray.events.messages import StageReport


class Arrivals:
    """The newest report of each of `actors` actors, in whatever order they arrive."""

    def __init__(self, actors: int, timeout_s: float) -> None:
        self._actors, self._timeout_s = actors, timeout_s
        self._reports: dict[tuple[int, int], StageReport] = {}
        self._changed = asyncio.Event()

    def add(self, report: StageReport) -> None:
        """Take a report, unless a newer one of its actor is here."""
        who = report.stage, report.shard
        known = self._reports.get(who)
        if known is None or report.epoch >= known.epoch:
            self._reports[who] = report
            self._changed.set()

    def forget(self) -> None:
        """Drop all of them."""
        self._reports = {}

    async def of(self, epoch: int) -> list[StageReport]:
        """Every stage's report of an epoch, once they are here; StepFailed after the timeout."""
        while True:
            fresh = [r for r in self._reports.values() if r.epoch == epoch]
            if len(fresh) == self._actors:
                return merged_reports(fresh)
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), self._timeout_s)
            except TimeoutError as error:
                raise StepFailed(
                    f"{len(fresh)} of {self._actors} actors reported epoch {epoch} within "
                    f"{self._timeout_s:.0f} s"
                ) from error
