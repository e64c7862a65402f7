"""Planted bugs: the model with one rule of the protocol broken each."""

# ruff: noqa: ARG002, ARG003 - an override keeps the signature of what it breaks

from __future__ import annotations

from dataclasses import replace
from typing import Self

from esper_ray.actors.protocol import (
    Answer,
    LayerInbox,
    ReceiptLedger,
    Reception,
    Stamp,
    Stamped,
)
from tests.model.model import Model, Steps
from tests.model.world import Inbox, Message, Move, Receipt, Row, Staged, World, is_legal

Applied = Move | None


class CompareAndSetIgnoresGeneration(Model):
    def compare_and_set(self, row: Row, move: Move) -> bool:
        return row.state == move.expected.state and is_legal(move.expected, move.target)


class CompareAndSetIgnoresState(Model):
    def compare_and_set(self, row: Row, move: Move) -> bool:
        return row.generation == move.expected.generation and is_legal(move.expected, move.target)


class PolicyProposesAnything(Model):
    """No bug of the protocol: compare-and-set refuses what the table does not allow."""

    def targets(self, row: Row) -> list[Row]:
        return [Row(state, row.generation) for state in sorted(self.scenario.states)]


class CompareAndSetIgnoresTable(PolicyProposesAnything):
    def compare_and_set(self, row: Row, move: Move) -> bool:
        return row == move.expected


class AcceptsAnyRunEpoch(LayerInbox[Move, Applied]):
    def adopt(self, run_epoch: int, term: int) -> tuple[Self, Answer]:
        return super().adopt(self.run_epoch, term)


class AcceptsOlderTerms(LayerInbox[Move, Applied]):
    def adopt(self, run_epoch: int, term: int) -> tuple[Self, Answer]:
        return super().adopt(run_epoch, max(term, self.term))


class KeepsBatchesOfOlderTerms(LayerInbox[Move, Applied]):
    def adopt(self, run_epoch: int, term: int) -> tuple[Self, Answer]:
        inbox, answer = super().adopt(run_epoch, term)
        return (replace(self, term=term) if answer is Answer.ACCEPTED else inbox), answer


class AcceptsUsedNumbers(LayerInbox[Move, Applied]):
    def offer(self, batch: Stamped[Move]) -> tuple[Self, Answer, Receipt | None]:
        forgetful, last = replace(self, last_number=0), self.last_number
        inbox, answer, receipt = super(AcceptsUsedNumbers, forgetful).offer(batch)
        return replace(inbox, last_number=last), answer, receipt


class UsesNumberWhenApplied(LayerInbox[Move, Applied]):
    def take(self) -> tuple[Self, Stamped[Move] | None]:
        inbox, batch = super().take()
        return replace(inbox, last_number=self.last_number), batch

    def applied(self, receipt: Receipt) -> Self:
        return replace(super().applied(receipt), last_number=receipt.stamp.number)


class AcknowledgesByNumber(LayerInbox[Move, Applied]):
    def acknowledge(self, stamp: Stamp) -> Self:
        same = [r.stamp for r in self.outbox if r.stamp.number == stamp.number]
        return super().acknowledge(same[0] if same else stamp)


class LogsRepeats(ReceiptLedger):
    def receive(self, stamp: Stamp) -> Reception:
        reception = super().receive(stamp)
        return Reception.NEW if reception is Reception.KNOWN else reception


class LogsAnyRunEpoch(ReceiptLedger):
    def receive(self, stamp: Stamp) -> Reception:
        return super().receive(replace(stamp, run_epoch=self.run_epoch))


class IssuesWhileInFlight(ReceiptLedger):
    @property
    def in_flight(self) -> bool:
        return False


class NumbersFromOneAfterRestart(ReceiptLedger):
    @classmethod
    def restore(cls, term: int, logged: int, inbox: Inbox) -> ReceiptLedger:  # type: ignore[override]
        return cls(inbox.run_epoch, term)


class GoesOnFromTheLogAfterRestart(ReceiptLedger):
    @classmethod
    def restore(cls, term: int, logged: int, inbox: Inbox) -> ReceiptLedger:  # type: ignore[override]
        return cls(inbox.run_epoch, term, logged, logged)


class AcknowledgesBeforeAppend(Model):
    def receive_receipt(self, world: World, receipt: Receipt) -> World | None:
        after = super().receive_receipt(world, receipt)
        if after is None:
            return None
        return after._replace(network=after.network | {Message("ack", receipt.stamp)})


class LogsOnlyWhatApplied(Model):
    def logged(self, log: tuple[Receipt, ...], receipt: Receipt) -> tuple[Receipt, ...]:
        return log if receipt.body is None else super().logged(log, receipt)


class CommitsWithAReceiptOutstanding(Model):
    def may_commit(self, world: World, staged: Staged) -> bool:
        return True


class CommitsTheEndOfTheLog(Model):
    def position(self, world: World, number: int) -> int:
        return len(world.log)


class CommitsWhatAnOlderRunEpochStaged(Model):
    def rewind(self, world: World) -> World:
        return super().rewind(world)._replace(staged=world.staged)


class AppendsAfterARewind(Model):
    def is_still_new(self, ledger: ReceiptLedger, receipt: Receipt) -> bool:
        return True


class NeverSendsAReceiptAgain(Model):
    def send_receipt_again(self, world: World, message: Message) -> Steps:
        return iter(())


class NeverSendsABatchAgain(Model):
    def send_batch_again(self, world: World, message: Message) -> Steps:
        return iter(())


def with_inbox(inbox: type[LayerInbox[Move, Applied]]) -> type[Model]:
    """The model with another layer end."""
    return type(inbox.__name__, (Model,), {"inbox_type": inbox})


def with_ledger(ledger: type[ReceiptLedger]) -> type[Model]:
    """The model with another coordinator end."""
    return type(ledger.__name__, (Model,), {"ledger_type": ledger})
