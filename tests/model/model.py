"""Actions of the protocol model and what must hold; the ends are the product's own values.

A step is one atomic event. The network is a set: a message stays until it is delivered or lost, so
that it may overtake any other, and what is sent again while it is on the way is one message.
Planted bugs override one method or one of the two end types.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from esper_ray.actors.protocol import Answer, LayerInbox, ReceiptLedger, Reception, Stamp, Stamped
from esper_ray.lifecycle import ExtendedLifecycle
from tests.model.search import Step
from tests.model.world import (
    Budget,
    Commit,
    Coordinator,
    Layer,
    Message,
    Move,
    Receipt,
    Row,
    Rows,
    Staged,
    World,
    is_legal,
    name,
    targets,
    words,
)

Steps = Iterator[Step[World]]


@dataclass(frozen=True, slots=True)
class Scenario:
    """Where the seeds start, what late telemetry says of them, and how much may happen."""

    rows: Rows
    late: tuple[tuple[int, Row], ...]
    states: frozenset[ExtendedLifecycle]
    budget: Budget


class Model:
    """The protocol as the two actors are to use it."""

    inbox_type: ClassVar[type[LayerInbox[Move, Move | None]]] = LayerInbox
    ledger_type: ClassVar[type[ReceiptLedger]] = ReceiptLedger

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario

    def start(self) -> World:
        """Run epoch 0, nothing on the way."""
        rows = self.scenario.rows
        layer = Layer(self.inbox_type(0), rows)
        coordinator = Coordinator(self.ledger_type(0, 0))
        budget = self.scenario.budget
        commit = Commit(rows, 0)
        return World(layer, None, coordinator, frozenset(), (), commit, (0,), None, 0, budget)

    def steps(self, world: World) -> Steps:
        """Every event that may come next."""
        yield from self._network(world)
        yield from self._coordinator(world)
        yield from self._layer(world)
        yield from self._crashes(world)

    # ---- network -------------------------------------------------------------------------------

    def _network(self, world: World) -> Steps:
        for message in world.network:
            gone = world._replace(network=world.network - {message})
            yield Step(f"lose {words(message)}", gone, fair=False)
            receive = getattr(self, f"receive_{message.kind}")
            if (after := receive(gone, message.content)) is None:
                continue
            yield Step(f"deliver {words(message)}", after, fair=True)
            if world.budget.duplicates:
                again = _spend(receive(world, message.content), "duplicates")
                yield Step(f"deliver a copy of {words(message)}", again, fair=False)

    def receive_offer(self, world: World, batch: Stamped[Move]) -> World | None:
        """Layer, control thread."""
        if world.layer is None:
            return None
        inbox, _, receipt = world.layer.inbox.offer(batch)
        world = world._replace(layer=world.layer._replace(inbox=inbox))
        return world if receipt is None else _send(world, Message("receipt", receipt))

    def receive_receipt(self, world: World, receipt: Receipt) -> World | None:
        """Coordinator; receipts of one layer are handled one after the other."""
        if world.coordinator is None or world.coordinator.appending is not None:
            return None
        reception = world.coordinator.ledger.receive(receipt.stamp)
        if reception is Reception.KNOWN:
            return _send(world, Message("ack", receipt.stamp))
        if reception is Reception.OTHER_RUN_EPOCH:
            return world
        return world._replace(coordinator=world.coordinator._replace(appending=receipt))

    def receive_ack(self, world: World, stamp: Stamp) -> World | None:
        """Layer, control thread."""
        if world.layer is None:
            return None
        inbox = world.layer.inbox.acknowledge(stamp)
        return world._replace(layer=world.layer._replace(inbox=inbox))

    # ---- coordinator ---------------------------------------------------------------------------

    def _coordinator(self, world: World) -> Steps:
        coordinator = world.coordinator
        if coordinator is None:
            yield Step("restart the coordinator", self.restart(world), fair=True)
            return
        if coordinator.appending is not None:
            yield Step("append", self.append(world, coordinator.appending), fair=True)
        if world.layer is None:
            yield Step("rewind", self.rewind(world), fair=True)
        if coordinator.sent is not None:
            yield from self.send_batch_again(world, Message("offer", coordinator.sent))
        if world.staged is not None and coordinator.ledger.run_epoch == world.run_epoch:
            yield from self._commit(world, world.staged)
        yield from self._propose(world, coordinator)

    def send_batch_again(self, world: World, message: Message) -> Steps:
        """The coordinator, while it waits for the receipt."""
        if message not in world.network:
            yield Step(f"send again {words(message)}", _send(world, message), fair=True)

    def _propose(self, world: World, coordinator: Coordinator) -> Steps:
        ledger, stamp = coordinator.ledger.stamp()
        if stamp is None or not world.budget.batches:
            return
        world = _spend(world, "batches")
        for seed, row in sorted(self._views(world)):
            for target in self.targets(row):
                batch = Stamped(stamp, Move(seed, row, target))
                sent = coordinator._replace(ledger=ledger, sent=batch)
                after = _send(world._replace(coordinator=sent), Message("offer", batch))
                yield Step(f"propose {words(Message('offer', batch))}", after, fair=False)

    def targets(self, row: Row) -> list[Row]:
        """What the policy may propose for a seed that it believes to be in `row`."""
        return targets(row, self.scenario.states)

    def _views(self, world: World) -> set[tuple[int, Row]]:
        """Whatever telemetry may say: any row there ever was, superseded or not yet logged."""
        views = {*enumerate(self.scenario.rows), *self.scenario.late}
        views |= {(r.body.seed, r.body.target) for r in world.log if r.body is not None}
        return views | (set(enumerate(world.layer.rows)) if world.layer else set())

    def append(self, world: World, receipt: Receipt) -> World:
        """Log what was applied, record it, acknowledge; unless a rewind came in between."""
        coordinator = world.coordinator
        assert coordinator is not None
        world = world._replace(coordinator=coordinator._replace(appending=None))
        if not self.is_still_new(coordinator.ledger, receipt):
            return world
        ledger, sent = coordinator.ledger.record(receipt.stamp), coordinator.sent
        if sent is not None and sent.stamp != receipt.stamp:
            asked, answered = name(sent.stamp), name(receipt.stamp)
            world = world._replace(breach=f"I7: batch {asked} was answered by {answered}")
        world = world._replace(coordinator=Coordinator(ledger))
        logged = self.logged(world.log, receipt)
        return _send(world._replace(log=logged), Message("ack", receipt.stamp))

    def is_still_new(self, ledger: ReceiptLedger, receipt: Receipt) -> bool:
        """Judged again when the append happens: a writer of an older run epoch is refused."""
        return ledger.receive(receipt.stamp) is Reception.NEW

    def logged(self, log: tuple[Receipt, ...], receipt: Receipt) -> tuple[Receipt, ...]:
        """The log with one receipt more, whatever it applied."""
        return (*log, receipt)

    def _commit(self, world: World, staged: Staged) -> Steps:
        if self.may_commit(world, staged):
            commit = Commit(staged.rows, self.position(world, staged.number))
            after = world._replace(commit=commit, staged=None)
            yield Step("run commit", after, fair=False)

    def may_commit(self, world: World, staged: Staged) -> bool:
        """Every receipt of the staged state is in the log."""
        assert world.coordinator is not None
        return world.coordinator.ledger.logged >= staged.number

    def position(self, world: World, number: int) -> int:
        """Just after the last entry that the staged state holds."""
        stamps = [entry.stamp for entry in world.log]
        held = [s.run_epoch == world.run_epoch and s.number <= number for s in stamps]
        return max([i + 1 for i, is_held in enumerate(held) if is_held], default=world.starts[-1])

    def restart(self, world: World) -> World:
        """A new term: rewind where the layer is lost, else go on from log and layer."""
        world = world._replace(term=world.term + 1)
        if world.layer is None:
            return self.rewind(world)
        inbox, answer = world.layer.inbox.adopt(world.run_epoch, world.term)
        assert answer is Answer.ACCEPTED
        stamps = [entry.stamp for entry in world.log]
        own = [stamp.number for stamp in stamps if stamp.run_epoch == world.run_epoch]
        ledger = self.ledger_type.restore(world.term, max(own, default=0), inbox)
        layer = world.layer._replace(inbox=inbox)
        return world._replace(layer=layer, coordinator=Coordinator(ledger))

    def rewind(self, world: World) -> World:
        """State and log go back to the run commit together, under a new run epoch."""
        epoch = world.run_epoch + 1
        coordinator = world.coordinator or Coordinator(self.ledger_type(epoch, world.term))
        return world._replace(
            layer=Layer(self.inbox_type(epoch, world.term), world.commit.rows),
            coordinator=Coordinator(
                self.ledger_type(epoch, world.term), appending=coordinator.appending
            ),
            starts=(*world.starts, world.commit.position),
            staged=None,
        )

    # ---- layer ---------------------------------------------------------------------------------

    def _layer(self, world: World) -> Steps:
        if world.zombie is not None:
            yield Step("zombie acts", self._zombie_acts(world, world.zombie), fair=False)
        layer = world.layer
        if layer is None:
            return
        for receipt in layer.inbox.outbox:
            yield from self.send_receipt_again(world, Message("receipt", receipt))
        if layer.taken is not None:
            layer, receipt, breach = self._apply(layer, layer.taken)
            after = world._replace(layer=layer, breach=breach)
            yield Step("apply", _send(after, Message("receipt", receipt)), fair=True)
            return
        inbox, batch = layer.inbox.take()
        if batch is not None:
            after = world._replace(layer=layer._replace(inbox=inbox, taken=batch))
            yield Step("take", after, fair=True)
        if world.budget.commits and world.staged is None:
            staged = Staged(layer.rows, layer.inbox.last_number)
            yield Step("stage", _spend(world, "commits")._replace(staged=staged), fair=False)

    def send_receipt_again(self, world: World, message: Message) -> Steps:
        """The layer, until the receipt is acknowledged."""
        if message not in world.network:
            yield Step(f"send again {words(message)}", _send(world, message), fair=True)

    def _apply(self, layer: Layer, batch: Stamped[Move]) -> tuple[Layer, Receipt, str]:
        move, breach = batch.body, ""
        before = layer.rows[move.seed]
        applied = self.compare_and_set(before, move)
        if applied:
            rows = (*layer.rows[: move.seed], move.target, *layer.rows[move.seed + 1 :])
            layer = layer._replace(rows=rows)
            if before != move.expected:
                breach = f"I2: a batch for {move.expected.words} changed {before.words}"
            elif not is_legal(before, move.target):
                breach = f"I5: {before.words} -> {move.target.words} is not in the table"
        receipt = Stamped(batch.stamp, move if applied else None)
        return layer._replace(inbox=layer.inbox.applied(receipt), taken=None), receipt, breach

    def compare_and_set(self, row: Row, move: Move) -> bool:
        """Whether the row still is as expected and the table allows the move."""
        return row == move.expected and is_legal(row, move.target)

    def _zombie_acts(self, world: World, zombie: Layer) -> World:
        """A process thought dead goes on to the next boundary and sends what it has."""
        if zombie.taken is None:
            inbox, batch = zombie.inbox.take()
            zombie = zombie._replace(inbox=inbox, taken=batch)
        if zombie.taken is not None:
            zombie, _, _ = self._apply(zombie, zombie.taken)
        sent = frozenset(Message("receipt", receipt) for receipt in zombie.inbox.outbox)
        return world._replace(zombie=None, network=world.network | sent)

    # ---- crashes -------------------------------------------------------------------------------

    def _crashes(self, world: World) -> Steps:
        budget = world.budget
        if budget.coordinator_crashes and world.coordinator is not None:
            after = _spend(world, "coordinator_crashes")._replace(coordinator=None)
            yield Step("crash the coordinator", after, fair=False)
        if budget.layer_crashes and world.layer is not None:
            after = _spend(world, "layer_crashes")._replace(layer=None, zombie=world.layer)
            yield Step("crash the layer", after, fair=False)


def _send(world: World, message: Message) -> World:
    return world._replace(network=world.network | {message})


def _spend(world: World, what: str) -> World:
    left: int = getattr(world.budget, what)
    return world._replace(budget=world.budget._replace(**{what: left - 1}))
