"""The two ends of the batch protocol, rule by rule; `tests/model` explores them together."""

from __future__ import annotations

import pytest

from esper_ray.actors.protocol import (
    OUTBOX_BOUND,
    Answer,
    LayerInbox,
    ReceiptLedger,
    Reception,
    Stamp,
    Stamped,
)

Inbox = LayerInbox[str, str]  # a type only: Python 3.11 cannot call it
EMPTY: Inbox = LayerInbox(0)


def _batch(number: int, term: int = 0, run_epoch: int = 0) -> Stamped[str]:
    return Stamped(Stamp(run_epoch, term, number), f"batch {number} of term {term}")


def _offer(inbox: Inbox, batch: Stamped[str]) -> tuple[Inbox, Answer]:
    after, answer, _ = inbox.offer(batch)
    return after, answer


def _applied(inbox: Inbox, batch: Stamped[str]) -> Inbox:
    inbox, _ = _offer(inbox, batch)
    inbox, taken = inbox.take()
    assert taken == batch
    return inbox.applied(Stamped(batch.stamp, "receipt"))


# ---- the layer's end ---------------------------------------------------------------------------


def test_a_batch_waits_until_it_is_taken_at_a_boundary() -> None:
    inbox, answer = _offer(EMPTY, _batch(1))
    assert answer is Answer.ACCEPTED
    inbox, taken = inbox.take()
    assert taken == _batch(1)
    assert inbox.take() == (inbox, None)


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (_batch(6, term=3, run_epoch=1), Answer.OTHER_RUN_EPOCH),
        (_batch(6, term=3, run_epoch=3), Answer.OTHER_RUN_EPOCH),
        (_batch(6, term=2, run_epoch=2), Answer.OLDER_TERM),
        (_batch(5, term=3, run_epoch=2), Answer.TAKEN_BEFORE),
        (_batch(4, term=3, run_epoch=2), Answer.TAKEN_BEFORE),
        (_batch(6, term=3, run_epoch=2), Answer.WAITING),
        (_batch(7, term=3, run_epoch=2), Answer.BUSY),
    ],
)
def test_a_refused_batch_changes_nothing(batch: Stamped[str], reason: Answer) -> None:
    waiting = _batch(6, term=3, run_epoch=2)
    inbox: Inbox = LayerInbox(run_epoch=2, term=3, last_number=5, pending=waiting)
    assert inbox.offer(batch) == (inbox, reason, None)


def test_a_batch_of_a_newer_term_replaces_one_that_waits() -> None:
    inbox, _ = _offer(EMPTY, _batch(1))
    inbox, answer = _offer(inbox, _batch(1, term=1))
    assert (answer, inbox.pending, inbox.term) == (Answer.ACCEPTED, _batch(1, term=1), 1)


def test_a_newer_coordinator_makes_a_waiting_batch_void() -> None:
    inbox, _ = _offer(EMPTY, _batch(1))
    inbox, answer = inbox.adopt(0, 1)
    assert (answer, inbox) == (Answer.ACCEPTED, LayerInbox(0, term=1))


@pytest.mark.parametrize(
    ("run_epoch", "term", "reason"),
    [(0, 1, Answer.OLDER_TERM), (1, 3, Answer.OTHER_RUN_EPOCH), (0, 2, Answer.ACCEPTED)],
)
def test_adopting_again_or_something_old_changes_nothing(
    run_epoch: int, term: int, reason: Answer
) -> None:
    inbox: Inbox = LayerInbox(0, term=2, pending=_batch(1, term=2))
    assert inbox.adopt(run_epoch, term) == (inbox, reason)


def test_a_repeat_is_refused_while_its_batch_is_being_applied() -> None:
    inbox, _ = _offer(EMPTY, _batch(1))[0].take()
    assert inbox.offer(_batch(1)) == (inbox, Answer.TAKEN_BEFORE, None)


def test_a_repeat_of_an_applied_batch_is_answered_by_its_receipt() -> None:
    inbox = _applied(EMPTY, _batch(1))
    receipt = Stamped(_batch(1).stamp, "receipt")
    assert inbox.offer(_batch(1)) == (inbox, Answer.TAKEN_BEFORE, receipt)
    acknowledged = inbox.acknowledge(receipt.stamp)
    assert acknowledged.offer(_batch(1)) == (acknowledged, Answer.TAKEN_BEFORE, None)


def test_another_batch_is_never_answered_by_a_receipt_of_the_same_number() -> None:
    inbox = _applied(EMPTY, _batch(1))
    _, answer, receipt = inbox.offer(_batch(1, term=1))
    assert (answer, receipt) == (Answer.TAKEN_BEFORE, None)


def test_a_receipt_stays_until_its_own_stamp_is_acknowledged() -> None:
    inbox = _applied(_applied(LayerInbox(1), _batch(1, run_epoch=1)), _batch(2, run_epoch=1))
    assert inbox.acknowledge(Stamp(0, 0, 1)) == inbox
    left = inbox.acknowledge(Stamp(1, 0, 1)).outbox
    assert [receipt.stamp.number for receipt in left] == [2]


def test_a_full_outbox_holds_the_next_batch_back_until_a_receipt_is_acknowledged() -> None:
    receipts = tuple(Stamped(Stamp(0, 0, n + 1), "receipt") for n in range(OUTBOX_BOUND))
    inbox, _ = _offer(
        LayerInbox(0, last_number=OUTBOX_BOUND, outbox=receipts), _batch(OUTBOX_BOUND + 1)
    )
    assert inbox.take() == (inbox, None)
    _, taken = inbox.acknowledge(receipts[0].stamp).take()
    assert taken == _batch(OUTBOX_BOUND + 1)


# ---- the coordinator's end ---------------------------------------------------------------------


def test_the_next_stamp_is_issued_when_the_receipt_is_in_the_log() -> None:
    ledger, first = ReceiptLedger(2, 3).stamp()
    assert first == Stamp(2, 3, 1)
    assert ledger.in_flight
    assert ledger.stamp() == (ledger, None)
    ledger = ledger.record(first)
    assert not ledger.in_flight
    assert ledger.stamp()[1] == Stamp(2, 3, 2)


def test_a_receipt_stays_new_until_it_is_recorded() -> None:
    ledger, stamp = ReceiptLedger(0, 0).stamp()
    assert stamp is not None
    assert ledger.receive(stamp) is Reception.NEW
    assert ledger.receive(stamp) is Reception.NEW
    assert ledger.record(stamp).receive(stamp) is Reception.KNOWN


def test_a_receipt_of_another_run_epoch_is_dropped() -> None:
    ledger, _ = ReceiptLedger(1, 0).stamp()
    assert ledger.receive(Stamp(0, 0, 1)) is Reception.OTHER_RUN_EPOCH
    assert ledger.receive(Stamp(2, 0, 1)) is Reception.OTHER_RUN_EPOCH


def test_a_restarted_coordinator_waits_for_the_receipt_that_is_not_in_the_log() -> None:
    inbox, _ = _applied(_applied(EMPTY, _batch(1)), _batch(2)).adopt(0, 1)
    ledger = ReceiptLedger.restore(term=1, logged=1, inbox=inbox)
    assert ledger.stamp() == (ledger, None)
    first, second = inbox.outbox
    assert ledger.receive(first.stamp) is Reception.KNOWN
    assert ledger.receive(second.stamp) is Reception.NEW
    assert ledger.record(second.stamp).stamp()[1] == Stamp(0, 1, 3)


def test_a_restarted_coordinator_waits_for_a_batch_that_is_being_applied() -> None:
    inbox, _ = _offer(EMPTY, _batch(1))[0].take()
    inbox, _ = inbox.adopt(0, 1)
    assert ReceiptLedger.restore(term=1, logged=0, inbox=inbox).in_flight


def test_numbers_of_batches_that_were_never_taken_are_issued_again() -> None:
    inbox, _ = _offer(_applied(EMPTY, _batch(1)), _batch(2))
    inbox, _ = inbox.adopt(0, 1)
    _, stamp = ReceiptLedger.restore(term=1, logged=1, inbox=inbox).stamp()
    assert stamp == Stamp(0, 1, 2)


def test_both_ends_are_hashable_values() -> None:
    assert len({EMPTY, EMPTY, _applied(EMPTY, _batch(1))}) == 2
    assert len({ReceiptLedger(0, 0), ReceiptLedger(0, 0).stamp()[0]}) == 2
