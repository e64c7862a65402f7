"""A stage at its step boundaries: batches wait here, receipts stay until they are logged."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from esper_ray.actors.protocol import Answer, LayerInbox, Stamp, Stamped
from esper_ray.errors import RunFailed, StepFailed
from esper_ray.events.messages import MetricsBatch, TransitionBatch, TransitionReceipt
from esper_ray.growth.stage import Stage

Inbox = LayerInbox[TransitionBatch, TransitionReceipt]
Receipts = list[Stamped[TransitionReceipt]]


class StageBoundary:
    """The layers' ends of the protocol; `offer` and `acknowledge` may come from another thread."""

    def __init__(self, stage: Stage, run_epoch: int) -> None:
        self._stage = stage
        self._lock = threading.Lock()
        self._inboxes: dict[str, Inbox] = {name: LayerInbox(run_epoch) for name in stage.trainers}

    def offer(self, batch: Stamped[TransitionBatch]) -> Answer:
        """Leave a batch for the next boundary, or say why it is not taken."""
        name = batch.body.layer_id
        with self._lock:
            self._inboxes[name], answer, _ = self._inboxes[name].offer(batch)
        return answer

    def follow(self, run_epoch: int, term: int) -> dict[str, Inbox]:
        """Every layer's end, once it follows a coordinator; StepFailed if it cannot."""
        with self._lock:
            for name, inbox in self._inboxes.items():
                self._inboxes[name], answer = inbox.adopt(run_epoch, term)
                if answer is not Answer.ACCEPTED:
                    reason = answer.name.lower().replace("_", " ")
                    raise StepFailed(f"layer {name!r} does not follow term {term}: {reason}")
            return dict(self._inboxes)

    def apply(self, metrics: Sequence[MetricsBatch]) -> Receipts:
        """Record metrics, apply what waits; every receipt that nobody has acknowledged."""
        for measured in metrics:
            self._stage.record(measured)
        for name in self._inboxes:
            with self._lock:
                self._inboxes[name], batch = self._inboxes[name].take()
            if batch is not None:
                receipt = Stamped(batch.stamp, self._stage.apply(batch.body))
                with self._lock:
                    self._inboxes[name] = self._inboxes[name].applied(receipt)
        return [receipt for inbox in self._inboxes.values() for receipt in inbox.outbox]

    def acknowledge(self, layer_id: str, stamp: Stamp) -> None:
        """Drop a receipt that is in the log."""
        with self._lock:
            self._inboxes[layer_id] = self._inboxes[layer_id].acknowledge(stamp)


def require_taken(batch: Stamped[TransitionBatch], answer: Answer) -> None:
    """RunFailed where a layer will never answer a batch by a receipt."""
    if answer in (Answer.BUSY, Answer.OLDER_TERM, Answer.OTHER_RUN_EPOCH):
        reason = answer.name.lower().replace("_", " ")
        raise RunFailed(
            f"layer {batch.body.layer_id!r} refused batch {batch.stamp.number}: {reason}",
            "another coordinator may be at work on this run",
        )
