"""Where the reports of stages wait until those of an epoch are complete."""

from __future__ import annotations

import asyncio

from esper_ray.errors import StepFailed
from esper_ray.events.messages import StageReport


class Arrivals:
    """The newest report of each of `stages` stages, in whatever order they arrive."""

    def __init__(self, stages: int, timeout_s: float) -> None:
        self._stages, self._timeout_s = stages, timeout_s
        self._reports: dict[int, StageReport] = {}
        self._changed = asyncio.Event()

    def add(self, report: StageReport) -> None:
        """Take a report, unless a newer one of its stage is here."""
        known = self._reports.get(report.stage)
        if known is None or report.epoch >= known.epoch:
            self._reports[report.stage] = report
            self._changed.set()

    def forget(self) -> None:
        """Drop all of them."""
        self._reports = {}

    async def of(self, epoch: int) -> list[StageReport]:
        """Every stage's report of an epoch, once they are here; StepFailed after the timeout."""
        while True:
            fresh = [r for r in self._reports.values() if r.epoch == epoch]
            if len(fresh) == self._stages:
                return sorted(fresh, key=lambda r: r.stage)
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), self._timeout_s)
            except TimeoutError as error:
                raise StepFailed(
                    f"{len(fresh)} of {self._stages} stages reported epoch {epoch} within "
                    f"{self._timeout_s:.0f} s"
                ) from error
