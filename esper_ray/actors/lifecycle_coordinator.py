"""Decides at every epoch boundary, and commits what the layers have stored."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from esper_ray.actors.pipeline import Pipeline
from esper_ray.errors import RunFailed
from esper_ray.events.messages import (
    EpochReport,
    Evaluation,
    EvaluationRequest,
    StageReport,
    TelemetryBatch,
    TransitionBatch,
    TransitionReceipt,
)
from esper_ray.growth import judging
from esper_ray.lifecycle import ExtendedLifecycle, LifecycleManager
from esper_ray.policy import (
    LayerReport,
    Measurement,
    PolicySettings,
    decide,
    judged_rows,
    transition_batch,
)
from esper_ray.storage import EpochRecord, Root, RunLog, codec

_S = ExtendedLifecycle


@dataclass(frozen=True, slots=True)
class CoordinatorSpec:
    """What to coordinate: `manifest` is put into every run commit as it is."""

    stages: int
    epochs: int
    batch_size: int
    every_epochs: int
    timeout_s: float
    policy: PolicySettings
    manager: LifecycleManager
    manifest: Mapping[str, object]


@dataclass(slots=True)
class Progress:
    """The coordinator's own state; stored in every commit."""

    number: int = 0
    transitions: int = 0
    states_visited: list[str] = field(default_factory=lambda: [_S.DORMANT.name])
    gate_losses: list[float] = field(default_factory=list)
    seeds: dict[str, dict[str, int]] = field(default_factory=dict)

    def count(self, batch: TransitionBatch, receipt: TransitionReceipt) -> None:
        """Add what a receipt says was applied."""
        self.transitions += int(receipt.applied.sum())
        reached = {_S(int(code)).name for code in batch.target[receipt.applied]}
        self.states_visited = [s.name for s in _S if s.name in {*self.states_visited, *reached}]

    def to_json(self) -> dict[str, object]:
        """For the run commit; repr keeps every bit of a float."""
        losses = [repr(loss) for loss in self.gate_losses]
        return {
            "number": self.number,
            "transitions": self.transitions,
            "states_visited": self.states_visited,
            "gate_losses": losses,
            "seeds": self.seeds,
        }

    @classmethod
    def from_json(cls, body: Mapping[str, object]) -> Progress:
        """The inverse of `to_json`."""
        stored = dict(body)
        losses = [float(str(loss)) for loss in _as_list(stored.pop("gate_losses"))]
        return cls(**stored, gate_losses=losses)  # type: ignore[arg-type]


def _as_list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, got {type(value).__name__}")
    return value


class LifecycleCoordinator:
    """One per run. Telemetry comes in, one transition batch per layer goes out."""

    def __init__(self, spec: CoordinatorSpec, root: Root) -> None:
        self._spec, self._root = spec, root
        self._reports: dict[int, StageReport] = {}
        self._arrived = asyncio.Event()
        self._progress = Progress()
        self._losses: list[tuple[int, float]] = []
        self._seq = 0

    async def setup(
        self, pipeline: Pipeline, progress: Mapping[str, object] | None, epoch: EpochRecord
    ) -> None:
        """Meet the layers; go on from a stored progress, as the writer of this run epoch."""
        self._pipeline, self._seq = pipeline, epoch.next_seq
        self._log = RunLog(self._root, epoch)
        if progress is not None:
            self._progress = Progress.from_json(progress)

    async def ingest(self, report: StageReport) -> None:
        """Take a stage's report; the newest of a stage wins, in whatever order they arrive."""
        known = self._reports.get(report.stage)
        if known is None or report.epoch >= known.epoch:
            self._reports[report.stage] = report
            self._arrived.set()

    async def end_epoch(self, epoch: int) -> EpochReport:
        """Judge, decide, have it applied and, where due, commit; all before the next step."""
        reports = await self._collect(epoch)
        telemetry = {t.layer_id: t for r in reports for t in r.telemetry}
        losses = reports[-1].losses
        first = reports[-1].step - len(losses)
        self._losses += [(first + i, loss) for i, loss in enumerate(losses)]
        measured, baseline = await self._measure(telemetry)
        gate_loss = float(baseline.loss[0])
        kept = [*self._progress.gate_losses, gate_loss]
        self._progress.gate_losses = kept[-judging.STABILITY_WINDOW :]
        layers = {
            layer_id: LayerReport(
                batch,
                gate_loss,
                judging.stability(self._progress.gate_losses),
                {seed: found for (owner, seed), found in measured.items() if owner == layer_id},
            )
            for layer_id, batch in telemetry.items()
        }
        batches = [self._decide(report) for report in layers.values()]
        moves, grafted = await self._apply(
            layers, [b for b in batches if len(b.seed_ids)], baseline
        )
        self._progress.seeds = _count_seeds(telemetry, moves)
        commit = await self._commit_if_due(epoch, reports[-1].step, grafted)
        return EpochReport(
            epoch=epoch,
            step=reports[-1].step,
            losses=losses,
            gate_loss=gate_loss,
            gate_accuracy=float(baseline.accuracy[0]),
            seeds=self._progress.seeds,
            moves=tuple(moves),
            transitions=self._progress.transitions,
            states_visited=tuple(self._progress.states_visited),
            commit=commit,
        )

    async def evaluate(self, split: str) -> Evaluation:
        """The model as it is on one split."""
        return await self._pipeline.evaluate(EvaluationRequest(self._next(), split, 1, {}))

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

    async def _measure(
        self, telemetry: Mapping[str, TelemetryBatch]
    ) -> tuple[dict[judging.Seed, Measurement], Evaluation]:
        minimum = self._spec.manager.minimum_epochs
        due = [
            (layer_id, int(seed_id))
            for layer_id, batch in telemetry.items()
            for seed_id in judged_rows(batch, minimum, self._spec.policy)
        ]
        found: dict[judging.Seed, Measurement] = {}
        requests = judging.counterfactual_requests(telemetry, due, self._next())
        for group, request in requests:
            result = await self._pipeline.evaluate(request)
            found.update(judging.measurements(telemetry, group, result))
            self._progress.number = request.number
        return found, result

    def _decide(self, report: LayerReport) -> TransitionBatch:
        decisions = decide(report, self._spec.policy, self._spec.manager)
        accepted = [d.request for d in decisions if d.accepted]
        return transition_batch(report, accepted, self._spec.policy, self._next(), self._seq)

    async def _apply(
        self,
        layers: Mapping[str, LayerReport],
        batches: Sequence[TransitionBatch],
        baseline: Evaluation,
    ) -> tuple[list[tuple[str, int, str, str]], bool]:
        metrics = [
            judging.metrics_batch(
                report.telemetry, report.measured, float(baseline.accuracy[0]), report.stability
            )
            for report in layers.values()
            if report.measured
        ]
        by_layer = {batch.layer_id: batch for batch in batches}
        moves: list[tuple[str, int, str, str]] = []
        for receipt in await self._pipeline.apply(batches, metrics):
            batch = by_layer[receipt.layer_id].take(receipt.applied)
            self._progress.count(by_layer[receipt.layer_id], receipt)
            moves += [
                (batch.layer_id, int(seed), _S(int(source)).name, _S(int(target)).name)
                for seed, source, target in zip(
                    batch.seed_ids, batch.expected_state, batch.target, strict=True
                )
            ]
        return moves, any(move[3] == _S.GRAFTING.name for move in moves)

    async def _commit_if_due(self, epoch: int, step: int, grafted: bool) -> int | None:
        """Commit every few epochs, at the end, and whenever a seed has left a rollback copy."""
        periodic = (epoch + 1) % self._spec.every_epochs == 0
        if not (periodic or grafted or epoch + 1 == self._spec.epochs):
            return None
        segments = await self._pipeline.save()
        steps, losses = zip(*self._losses, strict=True)
        table = codec.encode_table({"step": np.array(steps), "loss": np.array(losses)})
        segments.append(self._log.put_segment("metrics", table, "arrow", len(steps)))
        body = {
            **self._spec.manifest,
            "step": step,
            "epoch": epoch + 1,
            "samples": step * self._spec.batch_size,
            "coordinator": self._progress.to_json(),
        }
        self._log.commit(self._seq, body, segments)
        self._losses, committed = [], self._seq
        self._seq += 1
        return committed

    def _next(self) -> int:
        self._progress.number += 1
        return self._progress.number


def _count_seeds(
    telemetry: Mapping[str, TelemetryBatch], moves: Sequence[tuple[str, int, str, str]]
) -> dict[str, dict[str, int]]:
    """Seeds by layer and state after `moves`; states without a seed are left out."""
    counts: dict[str, dict[str, int]] = {}
    for layer_id, batch in telemetry.items():
        state = batch.state.copy()
        for owner, seed_id, _, target in moves:
            if owner == layer_id:
                state[seed_id] = ExtendedLifecycle[target]
        counts[layer_id] = {s.name: int((state == s).sum()) for s in _S if (state == s).any()}
    return counts
