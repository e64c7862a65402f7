"""Decides at every epoch boundary, and commits what the layers have stored."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from esper_ray.actors.boundary import Inbox
from esper_ray.actors.coordinator_spec import CoordinatorSpec
from esper_ray.actors.decider import Decider, Measured, Measuring
from esper_ray.actors.deliveries import Deliveries
from esper_ray.actors.journal import Journal
from esper_ray.actors.observation import Observation, moves_of
from esper_ray.actors.pipeline import Pipeline
from esper_ray.actors.progress import Progress, count_seeds
from esper_ray.actors.protocol import Reception, Stamped
from esper_ray.actors.standing import Standing
from esper_ray.actors.unfinished import UnfinishedCommit
from esper_ray.actors.work import Work
from esper_ray.errors import RunFailed, StepFailed, StorageUnavailable
from esper_ray.events import log as event_log
from esper_ray.events.messages import (
    EpochReport,
    Evaluation,
    EvaluationRequest,
    StageReport,
    TransitionBatch,
    TransitionReceipt,
)
from esper_ray.growth.assembly import load_module
from esper_ray.lifecycle import Decisions, ExtendedLifecycle, by_people
from esper_ray.storage import EpochRecord, Root, RunLog, codec

_S = ExtendedLifecycle
_KEPT = ("_decider", "_losses", "_seq", "_unfinished")
"""What a coordinator hands on, besides its journal and its deliveries."""


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
        self._unfinished: UnfinishedCommit | None = None
        self._work = Work()

    @property
    def _progress(self) -> Progress:
        return self._decider.progress

    async def setup(
        self,
        pipeline: Pipeline,
        progress: Mapping[str, object] | None,
        epoch: EpochRecord,
        fault: str = "",
    ) -> None:
        """Meet the layers; go on from a stored progress, as the writer of this run epoch.

        May be called again after `abort`: all but the requests of people is then forgotten. The
        fault that the run goes on from is told in its log.
        """
        self._pipeline, self._seq, self._run_epoch = pipeline, epoch.next_seq, epoch.run_epoch
        self._log = RunLog(self._root, epoch, self._spec.signing_key)
        self._decider.progress = Progress() if progress is None else Progress.from_json(progress)
        self._decider.commands.ask_again()
        self._reports, self._losses, self._unfinished = {}, [], None
        self._journal = Journal(self._progress.sequence)
        self._deliveries = Deliveries(epoch.run_epoch)
        if fault:
            self._journal.fault("REWOUND", fault)

    async def take_over(
        self,
        pipeline: Pipeline,
        standing: Standing,
        epoch: EpochRecord,
        term: int,
        inboxes: Mapping[str, Inbox],
    ) -> None:
        """Go on after a coordinator that was lost between two boundaries.

        The layers follow this one, their `inboxes` say up to where, and report to it once more.
        """
        await self.setup(pipeline, None, epoch)
        for name in _KEPT:
            setattr(self, name, standing.kept[name])
        self._deliveries = standing.deliveries.inherited(term, inboxes)
        self._journal.take_over(standing.news)
        self._journal.fault("REPLACED", "the coordinator was lost")

    async def abort(self) -> None:
        """Stop what it is at; answers once nothing of it is under way, storage least of all."""
        await self._work.stop()

    async def ping(self) -> int:
        """The run epoch that it coordinates."""
        return self._run_epoch

    async def ingest(self, report: StageReport, run_epoch: int | None = None) -> None:
        """Take a stage's report; the newest of a stage wins, in whatever order they arrive.

        One of another run epoch is dropped: its layer was given up, or has been rewound since.
        """
        known, ours = self._reports.get(report.stage), run_epoch in (None, self._run_epoch)
        if ours and (known is None or report.epoch >= known.epoch):
            self._reports[report.stage] = report
            self._arrived.set()

    async def request(self, action: str, layer_id: str, seed_ids: Sequence[int]) -> int:
        """Ask for a change of some seeds at the next epoch boundary; returns its number.

        The answers are in that boundary's EpochReport. ConfigError for an unknown action.
        """
        return self._decider.commands.add(action, layer_id, seed_ids)

    async def end_epoch(self, epoch: int) -> EpochReport:
        """Judge, decide, have it applied and, where due, commit; all before the next step."""
        return await self._work.run(self._end_epoch(epoch))

    async def close_epoch(self, epoch: int) -> tuple[EpochReport, Standing]:
        """`end_epoch`, and what another coordinator would have to know from then on."""
        report = await self.end_epoch(epoch)
        kept = {name: getattr(self, name) for name in _KEPT}
        return report, Standing(kept, self._deliveries, self._journal.news())

    async def _end_epoch(self, epoch: int) -> EpochReport:
        reports = await self._collect(epoch)
        losses, step = reports[-1].losses, reports[-1].step
        self._losses += [(step - len(losses) + i, loss) for i, loss in enumerate(losses)]
        now, gate_loss = await self._look(reports)
        decisions = self._decider.decide(now)
        applied = await self._apply(now, decisions)
        self._progress.seeds = count_seeds(now.telemetry, applied)
        commit, upload_error = await self._commit_if_due(now, decisions, applied)
        return EpochReport(
            epoch=epoch,
            step=step,
            losses=losses,
            gate_loss=gate_loss,
            gate_accuracy=now.accuracy,
            seeds=self._progress.seeds,
            moves=tuple(move for batch in applied for move in moves_of(batch)),
            transitions=self._progress.transitions,
            states_visited=tuple(self._progress.states_visited),
            commit=commit,
            answers=self._decider.commands.answered(),
            upload_error=upload_error,
        )

    async def evaluate(self, split: str) -> Evaluation:
        """The model as it is on one split."""
        request = EvaluationRequest(self._decider.next_number(), split, 1, {})
        return await self._work.run(self._pipeline.evaluate(request))

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
                raise StepFailed(
                    f"{len(fresh)} of {self._spec.stages} stages reported epoch {epoch} within "
                    f"{self._spec.timeout_s:.0f} s"
                ) from error

    async def _look(self, reports: Sequence[StageReport]) -> tuple[Observation, float]:
        """Measure the gate split; what the policy may see, and the gate loss."""
        telemetry = {t.layer_id: t for r in reports for t in r.telemetry}
        for batch in telemetry.values():
            self._journal.epoch(batch, reports[-1].step)
        measured, baseline = await self._evaluated(self._decider.measure(telemetry))
        gate = float(baseline.loss[0]), float(baseline.accuracy[0])
        now = self._decider.observe(reports[-1].epoch, reports[-1].step, telemetry, measured, gate)
        return now, gate[0]

    async def _evaluated(self, asking: Measuring) -> tuple[Measured, Evaluation]:
        """What `asking` returns, once the layers have evaluated all that it asks for."""
        request = next(asking)
        while True:
            try:
                request = asking.send(await self._pipeline.evaluate(request))
            except StopIteration as done:
                return cast(tuple[Measured, Evaluation], done.value)

    async def _apply(
        self, now: Observation, decisions: Mapping[str, Decisions]
    ) -> list[TransitionBatch]:
        """Have metrics recorded and accepted moves made; the rows that were applied."""
        metrics = now.metrics(self._progress)
        for measured in metrics:
            self._journal.metrics(measured, now.epoch, now.step)
        accepted = self._decider.settle(decisions)
        batches = {n: self._batch(now, d) for n, d in accepted.items()}
        done: list[TransitionBatch] = []
        for decided in decisions.values():
            self._journal.refusals(
                decided.take(by_people(decided.requests.cause)), now.epoch, now.step
            )
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
    ) -> tuple[int | None, str]:
        """Commit every few epochs, at the end, whenever a seed has left a rollback copy, and
        after what people asked for: a run that is done again does not ask again.

        The commit's number, or why it is not stored yet where that is let pass.
        """
        periodic = (now.epoch + 1) % self._spec.every_epochs == 0
        grafted = any((batch.target == _S.GRAFTING).any() for batch in applied)
        asked = any(by_people(batch.cause).any() for batch in applied)
        last = now.epoch + 1 == self._spec.epochs
        if not (periodic or grafted or asked or last):
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
        return seq, await self._work.in_thread(self._spec.mirror.follow, self._log)

    async def _commit(self, now: Observation) -> int:
        """Store what an interrupted commit still lacks, then all of this epoch, as a commit."""
        await self._work.in_thread(self._finish_commit)
        segments = await self._pipeline.save()
        steps, losses = zip(*self._losses, strict=True)
        table = codec.encode_table({"step": np.array(steps), "loss": np.array(losses)})
        put = self._log.put_segment
        segments.append(await self._work.in_thread(put, "metrics", table, "arrow", len(steps)))
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
        told = event_log.encode(events)
        self._unfinished = UnfinishedCommit(seq, body, segments, told, len(events))
        self._losses, self._seq = [], seq + 1
        await self._work.in_thread(self._finish_commit)
        return seq

    def _finish_commit(self) -> None:
        """Store events and manifest of a commit; after a failure the same bytes again."""
        if self._unfinished is not None:
            self._unfinished.store(self._log)
            self._unfinished = None
