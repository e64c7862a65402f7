"""A coordinator beside layers that only answer, through the real inboxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from esper_ray.actors.coordinator_spec import CoordinatorSpec
from esper_ray.actors.lifecycle_coordinator import LifecycleCoordinator
from esper_ray.actors.protocol import LayerInbox, Stamp, Stamped
from esper_ray.events.log import EventKind, Events, decode
from esper_ray.events.messages import (
    EpochReport,
    Evaluation,
    EvaluationRequest,
    MetricsBatch,
    StageReport,
    TelemetryBatch,
    TransitionBatch,
    TransitionReceipt,
)
from esper_ray.grafting import GraftingSettings
from esper_ray.lifecycle import MINIMUM_EPOCHS, LifecycleManager, Refusal
from esper_ray.policy import PolicySettings
from esper_ray.storage import EpochRecord, Root, RunLog, SegmentRef

MINIMA = dict.fromkeys(MINIMUM_EPOCHS, 1)
READY = {"local_loss": np.zeros(2, np.float32), "delta_ratio": np.zeros(2, np.float32)}
"""What two seeds in TRAINING report when their gate may open."""

Inbox = LayerInbox[TransitionBatch, TransitionReceipt]
Receipt = Stamped[TransitionReceipt]


@dataclass
class Layers:
    """A Pipeline that answers every row with `refusal` and keeps what it was asked.

    Layers in `silent` swallow their batches, `lost` acknowledgements do not arrive, and `strays`
    come back beside the receipts.
    """

    log: RunLog
    run_epoch: int
    refusal: Refusal = Refusal.NONE
    loss: float = 2.0
    gain: float = -1.0
    silent: set[str] = field(default_factory=set)
    lost: int = 0
    strays: list[Receipt] = field(default_factory=list)
    requests: list[EvaluationRequest] = field(default_factory=list)
    batches: list[TransitionBatch] = field(default_factory=list)
    stamps: list[Stamp] = field(default_factory=list)
    metrics: list[MetricsBatch] = field(default_factory=list)
    told: list[Receipt] = field(default_factory=list)
    acknowledged: list[tuple[str, Stamp]] = field(default_factory=list)
    inboxes: dict[str, Inbox] = field(default_factory=dict)

    async def evaluate(self, request: EvaluationRequest) -> Evaluation:
        self.requests.append(request)
        flipped = np.arange(request.settings) > 0
        loss, gain = np.where(flipped, self.loss / 2, self.loss), np.where(flipped, self.gain, 0.0)
        return Evaluation(loss, loss * 0 + 0.5, gain, gain - 0.1, gain + 0.1, 8)

    async def apply(
        self, batches: Sequence[Stamped[TransitionBatch]], metrics: Sequence[MetricsBatch]
    ) -> list[Receipt]:
        self.metrics += metrics
        for batch in batches:
            self._answer(batch)
        receipts = [r for inbox in reversed(self.inboxes.values()) for r in inbox.outbox]
        self.told += receipts
        return [*self.strays, *receipts]

    def _answer(self, batch: Stamped[TransitionBatch]) -> None:
        name, rows = batch.body.layer_id, len(batch.body.seed_ids)
        self.batches.append(batch.body)
        self.stamps.append(batch.stamp)
        if name in self.silent:
            return
        inbox, _, _ = self.inboxes.get(name, LayerInbox(self.run_epoch)).offer(batch)
        self.inboxes[name], taken = inbox.take()
        if taken is not None:
            reason = np.full(rows, self.refusal, np.uint8)
            receipt = TransitionReceipt(name, batch.body.number, 4, reason == 0, reason)
            self.inboxes[name] = self.inboxes[name].applied(Stamped(taken.stamp, receipt))

    async def acknowledge(self, layer_id: str, stamp: Stamp) -> None:
        self.acknowledged.append((layer_id, stamp))
        if self.lost:
            self.lost -= 1
        else:
            self.inboxes[layer_id] = self.inboxes[layer_id].acknowledge(stamp)

    async def save(self) -> list[SegmentRef]:
        return [self.log.put_segment("stage0/host", b"weights", "safetensors")]


def spec(**given: Any) -> CoordinatorSpec:
    values: dict[str, Any] = {
        "stages": 1,
        "epochs": 100,
        "batch_size": 8,
        "every_epochs": 100,
        "upload_errors_pass": False,
        "timeout_s": 5.0,
        "policy": PolicySettings(germinate_after=0, blueprint_id=3, strategy_id=0),
        "manager": LifecycleManager(minimum_epochs=MINIMA),
        "grafting": GraftingSettings(),
        "factory": "esper_ray.models:byte_mlp",
        "manifest": {"run": "fake", "config": {"seed": 1}},
    }
    return CoordinatorSpec(**{**values, **given})


async def build(
    root: Root,
    progress: dict[str, object] | None = None,
    resumed_from: int | None = None,
    **given: Any,
) -> tuple[LifecycleCoordinator, Layers, EpochRecord]:
    coordinator = LifecycleCoordinator(spec(**given), root)
    record = RunLog(root).open_epoch(resumed_from)
    layers = Layers(RunLog(root), record.run_epoch)
    await coordinator.setup(layers, progress, record)
    return coordinator, layers, record


def report(epoch: int, *layers: TelemetryBatch, stage: int = 0, loss: float = 1.0) -> StageReport:
    return StageReport(stage, epoch, 4 * (epoch + 1), layers, (loss, loss + 1, loss, loss))


async def run_epoch(coordinator: LifecycleCoordinator, *reports: StageReport) -> EpochReport:
    for each in reports:
        await coordinator.ingest(each)
    return await coordinator.end_epoch(reports[0].epoch)


def logged(root: Root, *kinds: EventKind) -> Events:
    """The events of a run's current history, or those of some kinds."""
    log = RunLog(root)
    events = Events.concatenate([decode(log.read_log(ref)) for _, ref in log.log_parts()])
    return events.take(np.isin(events.columns["kind"], kinds or list(EventKind)))
