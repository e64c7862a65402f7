"""Decides at every epoch boundary, and commits what the layers have stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from esper_ray.actors.arrivals import Arrivals
from esper_ray.actors.boundary import Inbox
from esper_ray.actors.coordinator_spec import CoordinatorSpec
from esper_ray.actors.decider import Decider, evaluated
from esper_ray.actors.deliveries import Deliveries
from esper_ray.actors.delivery import Delivery
from esper_ray.actors.governing import Governor
from esper_ray.actors.herald import Herald
from esper_ray.actors.journal import Journal
from esper_ray.actors.observation import Observation, moves_of
from esper_ray.actors.pipeline import Pipeline
from esper_ray.actors.progress import Progress, count_seeds
from esper_ray.actors.standing import Standing
from esper_ray.actors.stopping import Wish
from esper_ray.actors.unfinished import UnfinishedCommit
from esper_ray.actors.work import Work
from esper_ray.errors import StorageUnavailable
from esper_ray.events import log as event_log
from esper_ray.events.messages import (
    Answer,
    EpochReport,
    Evaluation,
    EvaluationRequest,
    MetricsBatch,
    StageReport,
    TransitionBatch,
)
from esper_ray.growth.assembly import load_module
from esper_ray.growth.judging import Seed
from esper_ray.lifecycle import Decisions, ExtendedLifecycle, by_people
from esper_ray.storage import EpochRecord, Root, RunLog, codec

_S = ExtendedLifecycle
_KEPT = ("_decider", "_losses", "_seq", "_unfinished", "_wish")
"""What a coordinator hands on, besides its journal and its deliveries."""


class LifecycleCoordinator:
    """One per run. Telemetry comes in, one transition batch per layer goes out."""

    def __init__(self, spec: CoordinatorSpec, root: Root) -> None:
        load_module(spec.factory)
        self._spec, self._root = spec, root
        self._decider = Decider(spec.policy, spec.manager, spec.grafting)
        self._arrivals = Arrivals(spec.actors, spec.timeout_s)
        self._journal, self._deliveries = Journal(0), Deliveries(0)
        self._losses: list[tuple[int, float]] = []
        self._seq = self._run_epoch = 0
        self._unfinished: UnfinishedCommit | None = None
        self._work = Work()
        self._notes: list[str] = []
        self._wish = Wish.RUN
        self._herald = Herald(spec.herald, root)

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
        self._arrivals.forget()
        self._losses, self._unfinished = [], None
        self._journal = Journal(self._progress.sequence)
        self._deliveries = Deliveries(epoch.run_epoch)
        if fault:
            self._journal.fault("REWOUND", fault)
        await self._herald.start(self._journal, epoch)

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
        if run_epoch in (None, self._run_epoch):
            self._arrivals.add(report)

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
        return await self._work.run(self._end_epoch(epoch))

    async def close_epoch(self, epoch: int) -> tuple[EpochReport, Standing]:
        """`end_epoch`, and what another coordinator would have to know from then on."""
        report = await self.end_epoch(epoch)
        kept = {name: getattr(self, name) for name in _KEPT}
        return report, Standing(kept, self._deliveries, self._journal.news())

    async def _end_epoch(self, epoch: int) -> EpochReport:
        self._notes = []
        reports, retired = await self._mended(await self._arrivals.of(epoch))
        self._herald.arrived(reports)
        losses, step = reports[-1].losses, reports[-1].step
        self._losses += [(step - len(losses) + i, loss) for i, loss in enumerate(losses)]
        self._progress.trained(losses)
        now, gate_loss = await self._look(reports)
        decisions = self._decider.decide(now)
        applied = await self._apply(now, decisions)
        self._progress.seeds = count_seeds(now.telemetry, applied)
        wish = self._wish
        commit, upload_error = await self._commit_if_due(now, decisions, applied, wish)
        report = EpochReport(
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
        await self._herald.boundary(report, last=epoch + 1 == self._spec.epochs)
        return report

    async def evaluate(self, split: str) -> Evaluation:
        """The model as it is on one split."""
        request = EvaluationRequest(self._decider.next_number(), split, 1, {})
        return await self._work.run(self._pipeline.evaluate(request))

    # ---- steps of an epoch boundary ------------------------------------------------------------

    async def _mended(
        self, reports: list[StageReport]
    ) -> tuple[list[StageReport], list[TransitionBatch]]:
        """The reports of an epoch, made again where a step of it went wrong."""
        governor = Governor(self._pipeline, self._journal, self._retire)
        mended = await governor.look(reports, self._progress.level(self._spec.divergence))
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
        places = self._deliveries, self._journal, self._pipeline, self._log
        delivery = Delivery(self._decider, *places, checkpoint_id=self._seq)
        done = await delivery.make(now, accepted, metrics)
        self._notes += delivery.problems
        return done

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
        grafted = any((batch.target == _S.GRAFTING).any() for batch in applied)
        asked = any(by_people(batch.cause).any() for batch in applied)
        halted, last = wish is not Wish.RUN, self._spec.is_last(now.epoch) or wish is Wish.STOP
        if not (self._spec.is_due(now.epoch) or grafted or asked or halted):
            return None, ""
        for decided in decisions.values():
            by_policy = decided.take(~by_people(decided.requests.cause))
            self._journal.refusals(by_policy, now.epoch, now.step)
        try:
            with self._herald.saving():
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
            **self._herald.stored(),
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
