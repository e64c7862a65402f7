"""The actor that owns one stage: host weights, seeds, state tensors and optimisers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from esper_ray.actors import persistence
from esper_ray.actors.boundary import Inbox, Receipts, StageBoundary
from esper_ray.actors.conveyor import Conveyor, StageShards
from esper_ray.actors.grid import Grid
from esper_ray.actors.protocol import Answer, Stamp, Stamped
from esper_ray.actors.schedule import Kind, plan
from esper_ray.actors.torch_dist import Meeting, Rendezvous, TorchDistTransport
from esper_ray.actors.transport import (
    Mailbox,
    ObjectStoreTransport,
    Receive,
    Tag,
    Teller,
    Transport,
    from_array,
)
from esper_ray.errors import StepFailed
from esper_ray.events.messages import (
    Evaluation,
    EvaluationRequest,
    MetricsBatch,
    OlderRows,
    StageReport,
    TransitionBatch,
)
from esper_ray.growth import checking
from esper_ray.growth.governor import Back, Keep, StepCheck, Try
from esper_ray.growth.memory import StageMemory
from esper_ray.growth.spec import StageSpec
from esper_ray.growth.stage import Stage
from esper_ray.storage import Root, RunLog, SegmentRef

_REPLY: Final = {Kind.FORWARD: Kind.BACKWARD.value, Kind.BACKWARD: ""}

CONCURRENCY_GROUPS: Final = {"compute": 1, "control": 2, "io": 1}

METHOD_GROUPS: Final = {
    "open_store": "compute",
    "setup": "compute",
    "idle": "compute",
    "run_step": "compute",
    "end_epoch": "compute",
    "evaluate": "compute",
    "apply": "compute",
    "save": "compute",
    "govern": "compute",
    "give_back": "compute",
    "end_epoch_again": "compute",
    "ping": "control",
    "most_in_flight": "control",
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


@dataclass(frozen=True, slots=True)
class Wiring:
    """How an actor reaches the others: all of them by Ray, or `meeting` for a process group."""

    grid: Grid
    rank: int
    actors: Sequence[Teller]
    meeting: Meeting | None = None


class LayerActor:
    """A shard of a stage, its neighbours and its mailbox; one call per optimiser step."""

    def __init__(self, spec: StageSpec, root: Root, timeout_s: float) -> None:
        self._spec, self._root, self._timeout_s = spec, root, timeout_s
        self._aborted: str | None = None
        self._ops = plan(spec.index, spec.count, spec.data.micro_batches)
        self._mailbox = Mailbox(timeout_s)
        self._transport: Transport | None = None
        self._rendezvous: Rendezvous | None = None
        self._run_epoch = 0

    def open_store(self, world: int, run_epoch: int) -> Meeting:
        """Keep the store by which the actors of a run epoch meet, on this node."""
        import ray

        host = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        self._rendezvous = Rendezvous(host, world, run_epoch, self._timeout_s)
        return self._rendezvous.meeting

    def setup(
        self, wiring: Wiring, coordinator: Teller, restore: Restore | None, run_epoch: int
    ) -> None:
        """Build the stage, restore it where asked, and meet the others.

        May be called again, for another run epoch: everything is built anew.
        """
        if self._transport is not None:
            self._transport.close()
        self._mailbox, self._aborted, self._run_epoch = Mailbox(self._timeout_s), None, run_epoch
        self._coordinator = coordinator
        self._log = RunLog(self._root)
        self._transport = self._connect(wiring)
        self._conveyor = Conveyor(self._transport, wiring.grid, wiring.rank)
        ranks = wiring.grid.ranks(self._spec.index)
        self._shards = StageShards(self._transport, ranks, self._spec.shard.index)
        self._stage = Stage(self._spec, self._shards if len(ranks) > 1 else None)
        self._memory = StageMemory(self._stage)
        self._boundary = StageBoundary(self._stage, run_epoch)
        if restore is not None:
            persistence.restore_stage(self._stage, restore.log(), restore.segments, restore.step)

    def _connect(self, wiring: Wiring) -> Transport:
        device = torch.device(self._spec.device)
        if wiring.meeting is None:
            peers = dict(enumerate(wiring.actors))
            return ObjectStoreTransport(self._mailbox, wiring.rank, peers, self._run_epoch, device)
        own = self._rendezvous
        if own is not None and own.meeting != wiring.meeting:
            own = None
        return TorchDistTransport(wiring.meeting, wiring.rank, device, self._timeout_s, own)

    # ---- compute: the only writer of tensors --------------------------------------------------

    def run_step(self, step: int) -> None:
        """One optimiser step: every micro-batch through this stage, forward and backward."""
        self._go_on()
        self._memory.before_step()
        self._step(step)

    def _step(self, step: int) -> None:
        stage, conveyor = self._stage, self._conveyor
        self._shards.begin("train", step)
        stage.begin_step(step)
        before, after = self._neighbours()
        for kind, micro_batch in self._ops:
            self._go_on()
            forward = kind is Kind.FORWARD
            tag = Tag(kind.value, step, micro_batch, reply=_REPLY[kind])
            received = conveyor.turn(tag, before if forward else after)
            compute = stage.forward if forward else stage.backward
            result = compute(micro_batch, received)
            conveyor.put(tag, after if forward else before, result)
        conveyor.flush()
        stage.finish_step()

    def _neighbours(self) -> tuple[int | None, int | None]:
        """Stages before and after this one."""
        index = self._spec.index
        return None if self._spec.first else index - 1, None if self._spec.last else index + 1

    def end_epoch(self, epoch: int) -> None:
        """Advance the seeds by one lifecycle epoch and report to the coordinator."""
        self._go_on()
        self.end_epoch_again(epoch)
        self.report()

    def end_epoch_again(self, epoch: int) -> StageReport:
        """The same where the coordinator has had the epoch's steps made again."""
        self._told = checking.end_epoch(self._stage, epoch)
        return self._told

    def govern(self, ask: Keep | Back | Try) -> StepCheck | None:
        """Keep or take back the stage as it was, or make a step as the governor wants it."""
        self._go_on()
        if isinstance(ask, Keep):
            self._memory.keep()
        elif isinstance(ask, Back):
            self._memory.back(ask.step)
        else:
            with checking.trying(self._stage, ask.trial) as watch:
                self._step(ask.trial.step)
            return checking.check(self._stage, watch)
        return None

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
        before, after = self._neighbours()
        self._shards.begin("evaluate", request.number)
        for number in range(self._stage.evaluation_batches(request)):
            self._go_on()
            tag = Tag("evaluate", request.number, number, steady=False)
            received = self._conveyor.turn(tag, before)
            self._conveyor.put(tag, after, self._stage.evaluate(request, number, received))
        self._conveyor.flush()
        return self._stage.evaluation()

    def apply(self, metrics: Sequence[MetricsBatch]) -> Receipts:
        """Record metrics, then apply what was offered; called between steps only."""
        return self._boundary.apply(metrics)

    def give_back(self, older: OlderRows) -> None:
        """Give seeds in ROLLED_BACK older strategies and measurements."""
        self._stage.give_back(older)

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

    def most_in_flight(self) -> int:
        """How many micro-batches of a step were kept for the backward at once, at most."""
        return self._stage.most_in_flight

    def offer(self, batch: Stamped[TransitionBatch]) -> Answer:
        """Leave a transition batch for the next step boundary, or hear why it is not taken."""
        return self._boundary.offer(batch)

    def acknowledge(self, layer_id: str, stamp: Stamp) -> None:
        """Forget a receipt that is in the log."""
        self._boundary.acknowledge(layer_id, stamp)

    def abort(self, reason: str) -> None:
        """Make the step fail, and all that are queued, until the next `setup`."""
        self._aborted = reason
        if self._transport is not None:
            self._transport.abort(reason)

    def deliver(
        self, run_epoch: int, what: Receive, array: NDArray[np.generic], dtype: str
    ) -> None:
        """Take in a tensor from another actor; one of another run epoch is dropped."""
        if run_epoch == self._run_epoch:
            self._mailbox.put(what, from_array(array, dtype))
