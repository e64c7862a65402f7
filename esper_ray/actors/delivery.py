"""Accepted moves on their way to the layers, and what the layers say of them, into the journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from esper_ray.actors.decider import Decider
from esper_ray.actors.deliveries import Deliveries
from esper_ray.actors.giving_back import give_back
from esper_ray.actors.journal import Journal
from esper_ray.actors.observation import Observation
from esper_ray.actors.pipeline import Pipeline
from esper_ray.actors.protocol import Reception, Stamped
from esper_ray.errors import RunFailed
from esper_ray.events.messages import MetricsBatch, TransitionBatch, TransitionReceipt
from esper_ray.lifecycle import Decisions
from esper_ray.storage import RunLog


@dataclass(frozen=True, slots=True)
class Delivery:
    """One batch per layer; `checkpoint_id` marks seeds that enter GRAFTING.

    `problems` says what rolled back seeds could not get back.
    """

    decider: Decider
    deliveries: Deliveries
    journal: Journal
    pipeline: Pipeline
    log: RunLog
    checkpoint_id: int
    problems: list[str] = field(default_factory=list)

    async def make(
        self, now: Observation, accepted: Mapping[str, Decisions], metrics: Sequence[MetricsBatch]
    ) -> list[TransitionBatch]:
        """Have metrics recorded, then moves made; the rows that were applied."""
        batches = {n: self._batch(now, d) for n, d in accepted.items()}
        done: list[TransitionBatch] = []
        for answer in await self.pipeline.apply(list(batches.values()), metrics):
            name, stamp = answer.body.layer_id, answer.stamp
            reception = self.deliveries.receive(name, stamp)
            if reception is Reception.NEW:
                done.append(self._book(now, answer.body, batches[name].body, accepted[name]))
                self.deliveries.book(name, stamp)
            if reception is not Reception.OTHER_RUN_EPOCH:
                await self.pipeline.acknowledge(name, stamp)
        if silent := self.deliveries.unanswered():
            raise RunFailed(f"layer {silent[0]!r} did not answer its transition batch")
        for batch in done:
            seen, places = now.telemetry[batch.layer_id], (self.pipeline, self.journal, self.log)
            self.problems.extend(await give_back(*places, seen, batch, now.step))
        return done

    def _book(
        self,
        now: Observation,
        receipt: TransitionReceipt,
        batch: TransitionBatch,
        accepted: Decisions,
    ) -> TransitionBatch:
        """Journal what a receipt says, and count it; the rows that were applied."""
        applied = self.decider.book(now, batch, receipt.applied, receipt.reason)
        self.journal.moves(applied, accepted.take(np.flatnonzero(receipt.applied)), receipt.step)
        return applied

    def _batch(self, now: Observation, accepted: Decisions) -> Stamped[TransitionBatch]:
        stamp = self.deliveries.stamp(accepted.requests.layer_id)
        batch = self.decider.batch(now, accepted, stamp.number, self.checkpoint_id)
        return Stamped(stamp, batch)
