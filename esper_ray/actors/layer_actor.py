"""The actor that owns one stage: host weights, seeds, state tensors and optimisers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from esper_ray.actors import persistence
from esper_ray.actors.boundary import Inbox, Receipts, StageBoundary
from esper_ray.actors.protocol import Answer, Stamp, Stamped
from esper_ray.actors.schedule import Kind, plan
from esper_ray.actors.transport import (
    Mailbox,
    ObjectStoreTransport,
    Peer,
    Send,
    Tag,
    Teller,
    from_array,
)
from esper_ray.errors import StepFailed
from esper_ray.events.messages import (
    Evaluation,
    EvaluationRequest,
    MetricsBatch,
    TransitionBatch,
)
from esper_ray.growth.spec import StageSpec
from esper_ray.growth.stage import Stage
from esper_ray.storage import Root, RunLog, SegmentRef

CONCURRENCY_GROUPS: Final = {"compute": 1, "control": 2, "io": 1}

METHOD_GROUPS: Final = {
    "setup": "compute",
    "idle": "compute",
    "run_step": "compute",
    "end_epoch": "compute",
    "evaluate": "compute",
    "apply": "compute",
    "save": "compute",
    "ping": "control",
    "follow": "compute",
    "report": "compute",
    "offer": "control",
    "acknowledge": "control",
    "abort": "control",
    "deliver": "io",
}


@dataclass(frozen=True, slots=True)
class Restore:
    """Where a stage takes its state from: segments of one verified run commit."""

    root: Root
    segments: Mapping[str, SegmentRef]
    step: int
    replicas: tuple[Root, ...] = ()

    def log(self) -> RunLog:
        """What the segments are read from."""
        return RunLog(self.root, replicas=self.replicas)


class LayerActor:
    """A stage, its neighbours and its mailbox; one call per optimiser step."""

    def __init__(self, spec: StageSpec, root: Root, timeout_s: float) -> None:
        self._spec, self._root, self._timeout_s = spec, root, timeout_s
        self._mailbox = Mailbox(timeout_s)
        self._aborted: str | None = None
        self._ops = plan(spec.index, spec.count, spec.data.micro_batches)

    def setup(
        self,
        peers: Mapping[Peer, Teller],
        coordinator: Teller,
        restore: Restore | None,
        run_epoch: int,
    ) -> None:
        """Build the stage, restore it where asked, and meet the others.

        May be called again, for another run epoch: everything is built anew.
        """
        self._mailbox, self._aborted, self._run_epoch = Mailbox(self._timeout_s), None, run_epoch
        self._transport = ObjectStoreTransport(self._mailbox, peers)
        self._coordinator = coordinator
        self._log = RunLog(self._root)
        self._stage = Stage(self._spec)
        self._boundary = StageBoundary(self._stage, run_epoch)
        if restore is not None:
            persistence.restore_stage(self._stage, restore.log(), restore.segments, restore.step)

    # ---- compute: the only writer of tensors --------------------------------------------------

    def run_step(self, step: int) -> None:
        """One optimiser step: every micro-batch through this stage, forward and backward."""
        self._go_on()
        stage, sends = self._stage, list[Send]()
        stage.begin_step(step)
        for kind, micro_batch in self._ops:
            self._go_on()
            forward = kind is Kind.FORWARD
            tag: Tag = (kind.value, step, micro_batch)
            source = not (self._spec.first if forward else self._spec.last)
            received = self._transport.exchange(sends, [tag] if source else [])
            compute = stage.forward if forward else stage.backward
            result = compute(micro_batch, received[0] if received else None)
            sends = self._onward(result, tag, to_next=forward)
        self._transport.exchange(sends, [])
        stage.finish_step()

    def _onward(self, result: Tensor | None, tag: Tag, *, to_next: bool) -> list[Send]:
        at_end = self._spec.last if to_next else self._spec.first
        if at_end or result is None:
            return []
        return [Send("next" if to_next else "previous", tag, result)]

    def end_epoch(self, epoch: int) -> None:
        """Advance the seeds by one lifecycle epoch and report to the coordinator."""
        self._go_on()
        self._told = self._stage.end_epoch(epoch)
        self.report()

    def report(self) -> None:
        """Tell the coordinator once more what was seen in the newest epoch."""
        self._coordinator.tell("ingest", self._told, self._run_epoch)

    def follow(self, coordinator: Teller, run_epoch: int, term: int) -> dict[str, Inbox]:
        """Turn to another coordinator; what it has to know of the batches of its forerunners."""
        inboxes = self._boundary.follow(run_epoch, term)
        self._coordinator = coordinator
        return inboxes

    def evaluate(self, request: EvaluationRequest) -> Evaluation | None:
        """The whole split forward under every alpha setting; changes nothing."""
        sends: list[Send] = []
        for number in range(self._stage.evaluation_batches(request)):
            self._go_on()
            tag: Tag = ("evaluate", request.number, number)
            received = self._transport.exchange(sends, [] if self._spec.first else [tag])
            y = self._stage.evaluate(request, number, received[0] if received else None)
            sends = self._onward(y, tag, to_next=True)
        self._transport.exchange(sends, [])
        return self._stage.evaluation()

    def apply(self, metrics: Sequence[MetricsBatch]) -> Receipts:
        """Record metrics, then apply what was offered; called between steps only."""
        return self._boundary.apply(metrics)

    def save(self) -> list[SegmentRef]:
        """Store this stage's segments; the coordinator commits them."""
        return persistence.save_stage(self._stage, self._log)

    def idle(self) -> None:
        """Answer once every call that came before has ended."""

    def _go_on(self) -> None:
        """Raise StepFailed after an abort: a stage that waits for nobody would not notice."""
        if self._aborted is not None:
            raise StepFailed(f"step aborted: {self._aborted}")

    # ---- control and io: never touch a tensor of the stage -------------------------------------

    def ping(self) -> int:
        """Index of the stage; answers while a step runs."""
        return self._spec.index

    def offer(self, batch: Stamped[TransitionBatch]) -> Answer:
        """Leave a transition batch for the next step boundary, or hear why it is not taken."""
        return self._boundary.offer(batch)

    def acknowledge(self, layer_id: str, stamp: Stamp) -> None:
        """Forget a receipt that is in the log."""
        self._boundary.acknowledge(layer_id, stamp)

    def abort(self, reason: str) -> None:
        """Make the step fail, and all that are queued, until the next `setup`."""
        self._aborted = reason
        self._mailbox.abort(reason)

    def deliver(self, tag: Tag, array: NDArray[np.generic], dtype: str) -> None:
        """Take in a tensor from a neighbour."""
        self._mailbox.put(tag, from_array(array, dtype))
