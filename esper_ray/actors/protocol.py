"""How transition batches reach a layer once and their receipts reach the log once; pure values.

The coordinator sends a stamped batch, the layer applies it at a step boundary, the receipt goes
back and is kept until it is acknowledged. Every message may be lost, repeated or late.
`tests/model` explores every order of events.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Final, Generic, Self, TypeVar

OUTBOX_BOUND: Final = 1024

T = TypeVar("T")
B = TypeVar("B")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Stamp:
    """Names one batch of a layer: `term` is its coordinator's, `number` ascends in a run epoch."""

    run_epoch: int
    term: int
    number: int


@dataclass(frozen=True, slots=True)
class Stamped(Generic[T]):
    """A batch, or the receipt that answers it, under the same stamp."""

    stamp: Stamp
    body: T


class Answer(Enum):
    """What a layer says to a coordinator; all but ACCEPTED and WAITING refuse."""

    ACCEPTED = auto()
    WAITING = auto()
    """This very batch is waiting for the step boundary already."""
    TAKEN_BEFORE = auto()
    """Its number is used; the receipt comes along if it still is in the outbox."""
    BUSY = auto()
    """Another batch of the same term is waiting."""
    OLDER_TERM = auto()
    OTHER_RUN_EPOCH = auto()


class Reception(Enum):
    """What a coordinator has to do with a receipt."""

    NEW = auto()
    """Append to the log, also if it applied nothing, then `record`, then acknowledge."""
    KNOWN = auto()
    """Acknowledge only: it is in the log."""
    OTHER_RUN_EPOCH = auto()
    """Drop it."""


@dataclass(frozen=True, slots=True)
class LayerInbox(Generic[B, R]):
    """A layer's end: at most one batch waits, receipts stay until they are acknowledged.

    A rewind makes a new `LayerInbox(run_epoch, term)`.
    """

    run_epoch: int
    term: int = 0
    last_number: int = 0
    """Of the last batch taken."""
    pending: Stamped[B] | None = None
    outbox: tuple[Stamped[R], ...] = ()

    def adopt(self, run_epoch: int, term: int) -> tuple[Self, Answer]:
        """Follow a coordinator; a newer one makes a batch of an older one that still waits void."""
        if run_epoch != self.run_epoch:
            return self, Answer.OTHER_RUN_EPOCH
        if term < self.term:
            return self, Answer.OLDER_TERM
        if term == self.term:
            return self, Answer.ACCEPTED
        return replace(self, term=term, pending=None), Answer.ACCEPTED

    def offer(self, batch: Stamped[B]) -> tuple[Self, Answer, Stamped[R] | None]:
        """Let a batch wait for the next step boundary, or say why not."""
        stamp = batch.stamp
        inbox, answer = self.adopt(stamp.run_epoch, stamp.term)
        if answer is not Answer.ACCEPTED:
            return self, answer, None
        if stamp.number <= inbox.last_number:
            receipt = next((r for r in inbox.outbox if r.stamp == stamp), None)
            return inbox, Answer.TAKEN_BEFORE, receipt
        if inbox.pending is not None:
            same = inbox.pending.stamp == stamp
            return inbox, Answer.WAITING if same else Answer.BUSY, None
        return replace(inbox, pending=batch), Answer.ACCEPTED, None

    def take(self) -> tuple[Self, Stamped[B] | None]:
        """Take the waiting batch at a step boundary; none while the outbox is full.

        Its number is used from here on, so that a repeat is refused while it is being applied.
        """
        if self.pending is None or len(self.outbox) >= OUTBOX_BOUND:
            return self, None
        number = self.pending.stamp.number
        return replace(self, pending=None, last_number=number), self.pending

    def applied(self, receipt: Stamped[R]) -> Self:
        """Keep the receipt of the batch taken last until it is acknowledged."""
        return replace(self, outbox=(*self.outbox, receipt))

    def acknowledge(self, stamp: Stamp) -> Self:
        """Drop a receipt that is in the log; an unknown stamp changes nothing."""
        return replace(self, outbox=tuple(r for r in self.outbox if r.stamp != stamp))


@dataclass(frozen=True, slots=True)
class ReceiptLedger:
    """A coordinator's end for one layer: one batch in flight, each receipt logged once.

    A rewind makes a new `ReceiptLedger(run_epoch, term)`.
    """

    run_epoch: int
    term: int
    issued: int = 0
    logged: int = 0
    """Every receipt up to this number is in the log."""

    @classmethod
    def restore(cls, term: int, logged: int, inbox: LayerInbox[B, R]) -> ReceiptLedger:
        """After a coordinator's crash; `inbox` has adopted `term`.

        `logged` is the highest number of the inbox's run epoch in the log, 0 if none.
        """
        return cls(inbox.run_epoch, term, inbox.last_number, logged)

    @property
    def in_flight(self) -> bool:
        """Whether a batch waits for its receipt to be recorded."""
        return self.issued > self.logged

    def stamp(self) -> tuple[ReceiptLedger, Stamp | None]:
        """Issue the stamp of the next batch; none while one is in flight."""
        if self.in_flight:
            return self, None
        number = self.issued + 1
        return replace(self, issued=number), Stamp(self.run_epoch, self.term, number)

    def receive(self, stamp: Stamp) -> Reception:
        """Say what to do with the receipt of this stamp; changes nothing."""
        if stamp.run_epoch != self.run_epoch:
            return Reception.OTHER_RUN_EPOCH
        return Reception.KNOWN if stamp.number <= self.logged else Reception.NEW

    def record(self, stamp: Stamp) -> ReceiptLedger:
        """Note that a NEW receipt is in the log; only now may it be acknowledged."""
        return replace(self, logged=stamp.number)
