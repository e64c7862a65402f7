"""Carries out what the governor asks for: between the layers, at the end of a bad epoch."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from esper_ray.actors.journal import Journal
from esper_ray.actors.observation import Observation, moves_of
from esper_ray.actors.pipeline import Pipeline
from esper_ray.events.messages import StageReport, TelemetryBatch, TransitionBatch
from esper_ray.growth.governor import Ask, Fault, Level, Retire, Skip, StepCheck, govern
from esper_ray.growth.judging import Seed
from esper_ray.policy import LayerReport, in_output

Delivering = Callable[[Observation, tuple[Seed, ...]], Awaitable[list[TransitionBatch]]]
"""Has seeds retired; the rows that were applied."""


@dataclass(slots=True)
class Mended:
    """An epoch made again: what the stages report of it now, and what was done to get there."""

    reports: list[StageReport]
    retired: list[TransitionBatch] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _is_bad(reports: Sequence[StageReport], level: Level) -> bool:
    """Whether a step of an epoch has to be made again."""
    return any(report.broken for report in reports) or not level.accepts(reports[-1].losses)


class Governor:
    """Goes back to the beginning of a bad epoch, and through it step by step."""

    def __init__(self, pipeline: Pipeline, journal: Journal, retire: Delivering) -> None:
        self._pipeline, self._journal, self._retire = pipeline, journal, retire

    async def look(self, reports: list[StageReport], level: Level) -> Mended:
        """What stages report of an epoch, which is made again where a step of it is bad.

        RunFailed where that cannot be.
        """
        return await self._mend(reports, level) if _is_bad(reports, level) else Mended(reports)

    async def _mend(self, reports: Sequence[StageReport], level: Level) -> Mended:
        last = reports[-1]
        telemetry = {t.layer_id: t for r in reports for t in r.telemetry}
        suspects = [(name, seed) for name, seen in telemetry.items() for seed in in_output(seen)]
        mended, checks = Mended([]), list[StepCheck]()
        steps = len(last.losses)
        asking = govern(last.step - steps, steps, level, suspects)
        request = next(asking, None)
        while request is not None:
            checks = await self._do(request, last.epoch - 1, telemetry, mended)
            try:
                request = asking.send(checks)
            except StopIteration:
                request = None
        mended.reports = await self._pipeline.end_epoch_again(last.epoch)
        return mended

    async def _do(
        self, ask: Ask, epoch: int, telemetry: Mapping[str, TelemetryBatch], mended: Mended
    ) -> list[StepCheck]:
        """One thing that is asked; `epoch` is the last that has ended."""
        if isinstance(ask, Retire):
            layers = {name: LayerReport(seen, None) for name, seen in telemetry.items()}
            now = Observation(epoch, ask.fault.step, layers, float("nan"))
            done = await self._retire(now, ask.seeds)
            mended.retired += done
            moves = [f"{n} seed {i}: {a} to {b}" for d in done for n, i, a, b in moves_of(d)]
            self._tell(ask.fault, epoch, f"retired {', '.join(moves)}", mended)
        elif isinstance(ask, Skip):
            self._tell(ask.fault, epoch, "no seed is guilty, its batch is skipped", mended)
        else:
            return await self._pipeline.govern(ask)
        return []

    def _tell(self, fault: Fault, epoch: int, outcome: str, mended: Mended) -> None:
        self._journal.panic(fault, epoch, outcome)
        mended.notes.append(f"step {fault.step} is made again: {fault.told}; {outcome}")
