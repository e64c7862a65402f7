"""Decides at every epoch boundary, and commits what the layers have stored."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from esper_ray.actors.coordinator_spec import CoordinatorSpec
from esper_ray.actors.decider import Decider, evaluated
from esper_ray.actors.deliveries import Deliveries
from esper_ray.actors.giving_back import give_back
from esper_ray.actors.governing import Governor, is_bad
from esper_ray.actors.journal import Journal
from esper_ray.actors.observation import Observation, moves_of
from esper_ray.actors.pipeline import Pipeline
from esper_ray.actors.progress import Progress, count_seeds
from esper_ray.actors.protocol import Reception, Stamped
from esper_ray.actors.stopping import Wish
from esper_ray.errors import RunFailed, StorageUnavailable
from esper_ray.events import log as event_log
from esper_ray.events.messages import (
    Answer,
    EpochReport,
    Evaluation,
    EvaluationRequest,
    MetricsBatch,
    StageReport,
    TransitionBatch,
    TransitionReceipt,
)
from esper_ray.growth.assembly import load_module
from esper_ray.growth.judging import Seed
from esper_ray.lifecycle import Decisions, ExtendedLifecycle, by_people
from esper_ray.storage import EpochRecord, Root, RunLog, SegmentRef, codec

_S = ExtendedLifecycle


@dataclass(frozen=True, slots=True)
class _Unfinished:
    """A commit whose segments are stored, and whose events or manifest may not be."""

    seq: int
    body: Mapping[str, object]
    segments: Sequence[SegmentRef]
    events: bytes
    rows: int


class LifecycleCoordinator:
    """One per run. Telemetry comes in, one transition batch per layer goes out."""

    def __init__(self, spec: CoordinatorSpec, root: Root) -> None:
        load_module(spec.factory)
        self._spec, self._root = spec, root
        self._decider = Decider(spec.policy, spec.manager, spec.grafting)
        self._reports: dict[int, StageReport] = {}
        self._arrived = asyncio.Event()
        self._journal, self._deliveries = Journal(0), Deliveries(0)
        self._losses: list[tuple[int, float]] = []
        self._seq = self._run_epoch = 0
        self._unfinished: _Unfinished | None = None
        self._notes: list[str] = []
        self._wish = Wish.RUN

    @property
    def _progress(self) -> Progress:
        return self._decider.progress

    async def setup(
        self, pipeline: Pipeline, progress: Mapping[str, object] | None, epoch: EpochRecord
    ) -> None:
        """Meet the layers; go on from a stored progress, as the writer of this run epoch."""
        self._pipeline, self._seq, self._run_epoch = pipeline, epoch.next_seq, epoch.run_epoch
        self._log = RunLog(self._root, epoch, self._spec.signing_key)
        if progress is not None:
            self._decider.progress = Progress.from_json(progress)
        self._journal = Journal(self._progress.sequence)
        self._deliveries = Deliveries(epoch.run_epoch)

    async def ping(self) -> int:
        """The run epoch that it coordinates."""
        return self._run_epoch

    async def ingest(self, report: StageReport) -> None:
        """Take a stage's report; the newest of a stage wins, in whatever order they arrive."""
        known = self._reports.get(report.stage)
        if known is None or report.epoch >= known.epoch:
            self._reports[report.stage] = report
            self._arrived.set()

    async def request(self, action: str, layer_id: str, seed_ids: Sequence[int]) -> int:
        """Ask for a change of some seeds at the next epoch boundary; returns its number.

        The answers are in that boundary's EpochReport. ConfigError for an unknown action.
        """
        return self._decider.commands.add(action, layer_id, seed_ids)

    async def answers(self, number: int) -> tuple[Answer, ...] | None:
        """What became of the seeds of a request, once it is judged."""
        return self._decider.commands.told(number)

    async def wish(self, wish: Wish | None = None) -> Wish:
        """Want something of the run as a whole, or only look; what holds now."""
        if wish is not None:
            self._wish = self._wish.then(wish)
        return self._wish

    async def end_epoch(self, epoch: int) -> EpochReport:
        """Judge, decide, have it applied and, where due, commit; all before the next step."""
        self._notes = []
        reports, retired = await self._mended(await self._collect(epoch))
        losses, step = reports[-1].losses, reports[-1].step
        self._losses += [(step - len(losses) + i, loss) for i, loss in enumerate(losses)]
        self._progress.trained(losses)
        now, gate_loss = await self._look(reports)
        decisions = self._decider.decide(now)
        applied = await self._apply(now, decisions)
        self._progress.seeds = count_seeds(now.telemetry, applied)
        wish = self._wish
        commit, upload_error = await self._commit_if_due(now, decisions, applied, wish)
        return EpochReport(
            epoch=epoch,
            step=step,
            losses=losses,
            gate_loss=gate_loss,
            gate_accuracy=now.accuracy,
            seeds=self._progress.seeds,
            moves=tuple(move for batch in (*retired, *applied) for move in moves_of(batch)),
            transitions=self._progress.transitions,
            states_visited=tuple(self._progress.states_visited),
            commit=commit,
            answers=self._decider.commands.answered(),
            upload_error=upload_error,
            notes=tuple(self._notes),
            wish=wish.value,
        )

    async def evaluate(self, split: str) -> Evaluation:
        """The model as it is on one split."""
        return await self._pipeline.evaluate(
            EvaluationRequest(self._decider.next_number(), split, 1, {})
        )

    # ---- steps of an epoch boundary ------------------------------------------------------------

    async def _collect(self, epoch: int) -> list[StageReport]:
        while True:
            fresh = [r for r in self._reports.values() if r.epoch == epoch]
            if len(fresh) == self._spec.stages:
                return sorted(fresh, key=lambda r: r.stage)
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), self._spec.timeout_s)
            except TimeoutError as error:
                raise RunFailed(
                    f"{len(fresh)} of {self._spec.stages} stages reported epoch {epoch} within "
                    f"{self._spec.timeout_s:.0f} s"
                ) from error

    async def _mended(
        self, reports: list[StageReport]
    ) -> tuple[list[StageReport], list[TransitionBatch]]:
        """The reports of an epoch, made again where a step of it went wrong."""
        level = self._progress.level(self._spec.divergence)
        if not is_bad(reports, level):
            return reports, []
        mended = await Governor(self._pipeline, self._journal, self._retire).mend(reports, level)
        self._notes += mended.notes
        return mended.reports, mended.retired

    async def _retire(self, now: Observation, seeds: tuple[Seed, ...]) -> list[TransitionBatch]:
        return await self._deliver(now, self._decider.settle(self._decider.retire(now, seeds)), [])

    async def _look(self, reports: Sequence[StageReport]) -> tuple[Observation, float]:
        """Measure the gate split; what the policy may see, and the gate loss."""
        telemetry = {t.layer_id: t for r in reports for t in r.telemetry}
        for batch in telemetry.values():
            self._journal.epoch(batch, reports[-1].step)
        measured, baseline = await evaluated(
            self._decider.measure(telemetry), self._pipeline.evaluate
        )
        gate = float(baseline.loss[0]), float(baseline.accuracy[0])
        now = self._decider.observe(reports[-1].epoch, reports[-1].step, telemetry, measured, gate)
        return now, gate[0]

    async def _apply(
        self, now: Observation, decisions: Mapping[str, Decisions]
    ) -> list[TransitionBatch]:
        """Have metrics recorded and accepted moves made; the rows that were applied."""
        metrics = now.metrics(self._progress)
        for measured in metrics:
            self._journal.metrics(measured, now.epoch, now.step)
        accepted = self._decider.settle(decisions)
        for decided in decisions.values():
            self._journal.refusals(
                decided.take(by_people(decided.requests.cause)), now.epoch, now.step
            )
        return await self._deliver(now, accepted, metrics)

    async def _deliver(
        self, now: Observation, accepted: Mapping[str, Decisions], metrics: Sequence[MetricsBatch]
    ) -> list[TransitionBatch]:
        batches = {n: self._batch(now, d) for n, d in accepted.items()}
        done: list[TransitionBatch] = []
        for answer in await self._pipeline.apply(list(batches.values()), metrics):
            name, stamp = answer.body.layer_id, answer.stamp
            reception = self._deliveries.receive(name, stamp)
            if reception is Reception.NEW:
                done.append(self._book(now, answer.body, batches[name].body, accepted[name]))
                self._deliveries.book(name, stamp)
            if reception is not Reception.OTHER_RUN_EPOCH:
                await self._pipeline.acknowledge(name, stamp)
        if silent := self._deliveries.unanswered():
            raise RunFailed(f"layer {silent[0]!r} did not answer its transition batch")
        for batch in done:
            seen, places = now.telemetry[batch.layer_id], (self._pipeline, self._journal, self._log)
            self._notes += await give_back(*places, seen, batch, now.step)
        return done

    def _book(
        self,
        now: Observation,
        receipt: TransitionReceipt,
        batch: TransitionBatch,
        accepted: Decisions,
    ) -> TransitionBatch:
        """Journal what a receipt says, and count it; the rows that were applied."""
        applied = self._decider.book(now, batch, receipt.applied, receipt.reason)
        self._journal.moves(applied, accepted.take(np.flatnonzero(receipt.applied)), receipt.step)
        return applied

    def _batch(self, now: Observation, accepted: Decisions) -> Stamped[TransitionBatch]:
        stamp = self._deliveries.stamp(accepted.requests.layer_id)
        return Stamped(stamp, self._decider.batch(now, accepted, stamp.number, self._seq))

    async def _commit_if_due(
        self,
        now: Observation,
        decisions: Mapping[str, Decisions],
        applied: Sequence[TransitionBatch],
        wish: Wish,
    ) -> tuple[int | None, str]:
        """Commit every few epochs, at the end, where the run halts, whenever a seed has left a
        rollback copy, and after what people asked for: a run that is done again does not ask again.

        The commit's number, or why it is not stored yet where that is let pass.
        """
        periodic = (now.epoch + 1) % self._spec.every_epochs == 0
        grafted = any((batch.target == _S.GRAFTING).any() for batch in applied)
        asked = any(by_people(batch.cause).any() for batch in applied)
        last = wish is Wish.STOP or now.epoch + 1 == self._spec.epochs
        if not (periodic or grafted or asked or last or wish is Wish.PAUSE):
            return None, ""
        for decided in decisions.values():
            by_policy = decided.take(~by_people(decided.requests.cause))
            self._journal.refusals(by_policy, now.epoch, now.step)
        try:
            seq = await self._commit(now)
        except StorageUnavailable as error:
            if last or not self._spec.upload_errors_pass:
                raise
            return None, str(error)
        return seq, self._spec.mirror.follow(self._log)

    async def _commit(self, now: Observation) -> int:
        """Store what an interrupted commit still lacks, then all of this epoch, as a commit."""
        self._finish_commit()
        segments = await self._pipeline.save()
        steps, losses = zip(*self._losses, strict=True)
        table = codec.encode_table({"step": np.array(steps), "loss": np.array(losses)})
        segments.append(self._log.put_segment("metrics", table, "arrow", len(steps)))
        events = self._journal.drain()
        self._progress.sequence = self._journal.sequence
        body = {
            **self._spec.manifest,
            "step": now.step,
            "epoch": now.epoch + 1,
            "samples": now.step * self._spec.batch_size,
            "coordinator": self._progress.to_json(),
        }
        seq = self._seq
        self._unfinished = _Unfinished(seq, body, segments, event_log.encode(events), len(events))
        self._losses, self._seq = [], seq + 1
        self._finish_commit()
        return seq

    def _finish_commit(self) -> None:
        """Store events and manifest of a commit; after a failure the same bytes again."""
        if (made := self._unfinished) is not None:
            told = self._log.put_log(made.seq, made.events, made.rows)
            self._log.commit(made.seq, made.body, made.segments, told)
            self._unfinished = None
