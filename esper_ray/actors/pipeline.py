"""The stages of a model as the coordinator sees them, and the plain form in one process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from esper_ray.actors import persistence
from esper_ray.actors.layer_actor import Restore
from esper_ray.events.messages import (
    Evaluation,
    EvaluationRequest,
    MetricsBatch,
    StageReport,
    TransitionBatch,
    TransitionReceipt,
)
from esper_ray.growth.spec import StageSpec
from esper_ray.growth.stage import Stage
from esper_ray.storage import Root, RunLog, SegmentRef


class Pipeline(Protocol):
    """What the coordinator asks of all stages together."""

    async def evaluate(self, request: EvaluationRequest) -> Evaluation:
        """Losses of a split under the request's alphas."""
        ...

    async def apply(
        self, batches: Sequence[TransitionBatch], metrics: Sequence[MetricsBatch]
    ) -> list[TransitionReceipt]:
        """Record and apply at the step boundary; one receipt per batch, in any order."""
        ...

    async def save(self) -> list[SegmentRef]:
        """Store every stage's segments."""
        ...


class Actor(Protocol):
    """An actor handle: see `actors.remote.RemoteActor`."""

    def tell(self, method: str, *args: object) -> None:
        """Call without waiting."""
        ...

    async def ask(self, method: str, *args: object) -> Any:
        """Call and wait for the result."""
        ...


@dataclass(frozen=True, slots=True)
class ActorPipeline:
    """Stages that live in LayerActors; `stage_of` says which one owns a layer."""

    actors: Sequence[Actor]
    stage_of: Mapping[str, int]

    async def evaluate(self, request: EvaluationRequest) -> Evaluation:
        """Every stage runs its part; the last one answers."""
        result: Evaluation = (await self._all("evaluate", request))[-1]
        return result

    async def apply(
        self, batches: Sequence[TransitionBatch], metrics: Sequence[MetricsBatch]
    ) -> list[TransitionReceipt]:
        """Offer each layer its batch, then let the owners apply."""
        for batch in batches:
            await self.actors[self.stage_of[batch.layer_id]].ask("offer", batch)
        own: dict[int, list[MetricsBatch]] = {self.stage_of[b.layer_id]: [] for b in batches}
        for measured in metrics:
            own.setdefault(self.stage_of[measured.layer_id], []).append(measured)
        asked = [self.actors[index].ask("apply", part) for index, part in own.items()]
        return [receipt for receipts in await asyncio.gather(*asked) for receipt in receipts]

    async def save(self) -> list[SegmentRef]:
        """All stages store at once."""
        return [ref for refs in await self._all("save") for ref in refs]

    async def _all(self, method: str, *args: object) -> list[Any]:
        """Ask every actor at once; the first failure is raised without waiting for the rest."""
        return await asyncio.gather(*(actor.ask(method, *args) for actor in self.actors))


class LocalPipeline:
    """The same stages one after the other in this process: the reference."""

    def __init__(self, specs: Sequence[StageSpec], root: Root, restore: Restore | None) -> None:
        self._log = RunLog(root)
        self.stages = [Stage(spec) for spec in specs]
        self._owner = {layer: stage for stage in self.stages for layer in stage.trainers}
        if restore is not None:
            for stage in self.stages:
                log = RunLog(restore.root)
                persistence.restore_stage(stage, log, restore.segments, restore.step)

    def run_step(self, step: int) -> None:
        """One optimiser step: each micro-batch forward and backward through all stages."""
        for stage in self.stages:
            stage.begin_step(step)
        for micro_batch in range(self.stages[0].spec.data.micro_batches):
            x: Tensor | None = None
            for stage in self.stages:
                x = stage.forward(micro_batch, x)
            gradient: Tensor | None = None
            for stage in reversed(self.stages):
                gradient = stage.backward(micro_batch, gradient)
        for stage in self.stages:
            stage.finish_step()

    def end_epoch(self, epoch: int) -> list[StageReport]:
        """Advance all seeds by one lifecycle epoch."""
        return [stage.end_epoch(epoch) for stage in self.stages]

    async def evaluate(self, request: EvaluationRequest) -> Evaluation:
        """See Pipeline."""
        for number in range(self.stages[0].evaluation_batches(request)):
            x: Tensor | None = None
            for stage in self.stages:
                x = stage.evaluate(request, number, x)
        result = self.stages[-1].evaluation()
        if result is None:
            raise RuntimeError("the last stage computes no loss")
        return result

    async def apply(
        self, batches: Sequence[TransitionBatch], metrics: Sequence[MetricsBatch]
    ) -> list[TransitionReceipt]:
        """See Pipeline."""
        for measured in metrics:
            self._owner[measured.layer_id].record(measured)
        return [self._owner[batch.layer_id].apply(batch) for batch in batches]

    async def save(self) -> list[SegmentRef]:
        """See Pipeline."""
        return [ref for stage in self.stages for ref in persistence.save_stage(stage, self._log)]
