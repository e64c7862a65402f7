"""The stages of a model as the coordinator sees them, and the plain form in one process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from esper_ray.actors import persistence
from esper_ray.actors.boundary import Receipts, StageBoundary, require_taken
from esper_ray.actors.grid import Grid
from esper_ray.actors.layer_actor import Restore
from esper_ray.actors.protocol import Stamp, Stamped
from esper_ray.actors.sharding import merged_receipt, merged_reports, split_rows
from esper_ray.events.messages import (
    Evaluation,
    EvaluationRequest,
    MetricsBatch,
    OlderRows,
    StageReport,
    TransitionBatch,
    TransitionReceipt,
)
from esper_ray.growth import checking
from esper_ray.growth.governor import Back, Keep, StepCheck, Try
from esper_ray.growth.memory import StageMemory
from esper_ray.growth.spec import StageSpec
from esper_ray.growth.stage import Stage
from esper_ray.storage import Root, RunLog, SegmentRef


class Pipeline(Protocol):
    """What the coordinator asks of all stages together."""

    async def evaluate(self, request: EvaluationRequest) -> Evaluation:
        """Losses of a split under the request's alphas."""
        ...

    async def apply(
        self, batches: Sequence[Stamped[TransitionBatch]], metrics: Sequence[MetricsBatch]
    ) -> Receipts:
        """Record and apply at the step boundary; receipts that are not acknowledged yet."""
        ...

    async def acknowledge(self, layer_id: str, stamp: Stamp) -> None:
        """Tell a layer that its receipt is in the log."""
        ...

    async def give_back(self, older: OlderRows) -> None:
        """Give seeds in ROLLED_BACK older strategies and measurements."""
        ...

    async def save(self) -> list[SegmentRef]:
        """Store every stage's segments."""
        ...

    async def govern(self, ask: Keep | Back | Try) -> list[StepCheck]:
        """Do as the governor asks; a StepCheck per stage, none where no step was made."""
        ...

    async def end_epoch_again(self, epoch: int) -> list[StageReport]:
        """What the stages report of an epoch whose steps were made again."""
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
class Home:
    """Where a layer lives, and how many seeds it has."""

    stage: int
    seeds: int


def homes(stages: Sequence[StageSpec]) -> dict[str, Home]:
    """The home of every layer, by its id."""
    return {
        layer.layer_id: Home(stage.index, layer.num_seeds)
        for stage in stages
        for layer in stage.layers
    }


@dataclass(frozen=True, slots=True)
class ActorPipeline:
    """Stages that live in LayerActors, which are in the order of their ranks."""

    actors: Sequence[Actor]
    grid: Grid
    homes: Mapping[str, Home]

    async def evaluate(self, request: EvaluationRequest) -> Evaluation:
        """Every stage runs its part; the last one answers."""
        last = self.grid.rank(len(self.grid.shards) - 1, 0)
        result: Evaluation = (await self._all("evaluate", request))[last]
        return result

    async def apply(
        self, batches: Sequence[Stamped[TransitionBatch]], metrics: Sequence[MetricsBatch]
    ) -> Receipts:
        """Offer each shard its part of a layer's batch, then let all shards concerned apply."""
        for batch in batches:
            await self._offer(batch)
        concerned = {b.body.layer_id for b in batches} | {m.layer_id for m in metrics}
        own: dict[int, list[MetricsBatch]] = {
            rank: []
            for stage in {self.homes[layer_id].stage for layer_id in concerned}
            for rank in self.grid.ranks(stage)
        }
        for measured in metrics:
            ranks = self._ranks(measured.layer_id)
            parts = split_rows(measured, self.homes[measured.layer_id].seeds, len(ranks))
            for rank, part in zip(ranks, parts, strict=True):
                own[rank].append(part)
        asked = [self.actors[rank].ask("apply", parts) for rank, parts in own.items()]
        return self._merged(await asyncio.gather(*asked), batches)

    async def _offer(self, batch: Stamped[TransitionBatch]) -> None:
        ranks = self._ranks(batch.body.layer_id)
        parts = split_rows(batch.body, self.homes[batch.body.layer_id].seeds, len(ranks))
        for rank, part in zip(ranks, parts, strict=True):
            answer = await self.actors[rank].ask("offer", Stamped(batch.stamp, part))
            require_taken(batch, answer)

    def _merged(
        self, told: Sequence[Receipts], batches: Sequence[Stamped[TransitionBatch]]
    ) -> Receipts:
        """One receipt of each batch, once all shards have sent theirs; known ones come again."""
        asked = {(batch.body.layer_id, batch.stamp): batch.body.seed_ids for batch in batches}
        found: dict[tuple[str, Stamp], list[TransitionReceipt]] = {}
        for receipts in told:  # in the order of the ranks
            for receipt in receipts:
                found.setdefault((receipt.body.layer_id, receipt.stamp), []).append(receipt.body)
        return [
            Stamped(stamp, merged_receipt(asked.get((name, stamp)), self.homes[name].seeds, parts))
            for (name, stamp), parts in found.items()
            if len(parts) == len(self._ranks(name))
        ]

    async def acknowledge(self, layer_id: str, stamp: Stamp) -> None:
        """See Pipeline; the layer repeats what is lost."""
        for rank in self._ranks(layer_id):
            self.actors[rank].tell("acknowledge", layer_id, stamp)

    async def give_back(self, older: OlderRows) -> None:
        """See Pipeline."""
        ranks = self._ranks(older.layer_id)
        parts = split_rows(older, self.homes[older.layer_id].seeds, len(ranks))
        await asyncio.gather(
            *(
                self.actors[rank].ask("give_back", part)
                for rank, part in zip(ranks, parts, strict=True)
                if len(part.seed_ids)
            )
        )

    async def save(self) -> list[SegmentRef]:
        """All stages store at once."""
        return [ref for refs in await self._all("save") for ref in refs]

    async def govern(self, ask: Keep | Back | Try) -> list[StepCheck]:
        """See Pipeline."""
        return [check for check in await self._all("govern", ask) if check is not None]

    async def end_epoch_again(self, epoch: int) -> list[StageReport]:
        """See Pipeline."""
        return merged_reports(await self._all("end_epoch_again", epoch))

    def _ranks(self, layer_id: str) -> range:
        return self.grid.ranks(self.homes[layer_id].stage)

    async def _all(self, method: str, *args: object) -> list[Any]:
        """Ask every actor at once; the first failure is raised without waiting for the rest."""
        return await asyncio.gather(*(actor.ask(method, *args) for actor in self.actors))


class LocalPipeline:
    """The same stages one after the other in this process: the reference."""

    def __init__(
        self, specs: Sequence[StageSpec], root: Root, restore: Restore | None, run_epoch: int
    ) -> None:
        self._log = RunLog(root)
        self.stages = [Stage(spec) for spec in specs]
        self._memories = [StageMemory(stage) for stage in self.stages]
        self._boundaries = [StageBoundary(stage, run_epoch) for stage in self.stages]
        self._owner = {
            layer: boundary
            for stage, boundary in zip(self.stages, self._boundaries, strict=True)
            for layer in stage.trainers
        }
        if restore is not None:
            for stage in self.stages:
                persistence.restore_stage(stage, restore.log(), restore.segments, restore.step)

    def run_step(self, step: int) -> None:
        """One optimiser step: each micro-batch forward and backward through all stages."""
        for memory in self._memories:
            memory.before_step()
        self._step(step)

    def _step(self, step: int) -> None:
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
        return [checking.end_epoch(stage, epoch) for stage in self.stages]

    async def end_epoch_again(self, epoch: int) -> list[StageReport]:
        """See Pipeline."""
        return self.end_epoch(epoch)

    async def govern(self, ask: Keep | Back | Try) -> list[StepCheck]:
        """See Pipeline."""
        if not isinstance(ask, Try):
            for memory in self._memories:
                memory.keep() if isinstance(ask, Keep) else memory.back(ask.step)
            return []
        with ExitStack() as stack:
            watched = [
                (stage, stack.enter_context(checking.trying(stage, ask.trial)))
                for stage in self.stages
            ]
            self._step(ask.trial.step)
        return [checking.check(stage, watch) for stage, watch in watched]

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
        self, batches: Sequence[Stamped[TransitionBatch]], metrics: Sequence[MetricsBatch]
    ) -> Receipts:
        """See Pipeline."""
        for batch in batches:
            require_taken(batch, self._owner[batch.body.layer_id].offer(batch))
        receipts: Receipts = []
        for boundary in self._boundaries:
            own = [m for m in metrics if self._owner[m.layer_id] is boundary]
            receipts += boundary.apply(own)
        return receipts

    async def acknowledge(self, layer_id: str, stamp: Stamp) -> None:
        """See Pipeline."""
        self._owner[layer_id].acknowledge(layer_id, stamp)

    async def give_back(self, older: OlderRows) -> None:
        """See Pipeline."""
        [owner] = [stage for stage in self.stages if older.layer_id in stage.trainers]
        owner.give_back(older)

    async def save(self) -> list[SegmentRef]:
        """See Pipeline."""
        return [ref for stage in self.stages for ref in persistence.save_stage(stage, self._log)]
