"""The coordinator's ends of the protocol: a batch in flight per layer, each receipt booked once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from esper_ray.actors.protocol import LayerInbox, ReceiptLedger, Reception, Stamp
from esper_ray.errors import RunFailed, StepFailed


class Deliveries:
    """One ledger per layer, of one run epoch and term."""

    def __init__(self, run_epoch: int, term: int = 1) -> None:
        self._run_epoch, self._term = run_epoch, term
        self._ledgers: dict[str, ReceiptLedger] = {}

    def inherited(self, term: int, inboxes: Mapping[str, LayerInbox[Any, Any]]) -> Self:
        """Those of the next coordinator, whose `term` all inboxes have adopted.

        StepFailed where a layer has taken a batch that these do not know.
        """
        heir = type(self)(self._run_epoch, term)
        for name, inbox in inboxes.items():
            known = self._ledger(name)
            heir._ledgers[name] = ReceiptLedger.restore(term, known.logged, inbox)
            if heir._ledgers[name].in_flight:
                raise StepFailed(f"layer {name!r} has gone on without the coordinator")
        return heir

    def stamp(self, layer_id: str) -> Stamp:
        """The stamp of a layer's next batch; RunFailed while it owes a receipt."""
        ledger, stamp = self._ledger(layer_id).stamp()
        if stamp is None:
            raise RunFailed(f"layer {layer_id!r} has not answered batch {ledger.issued}")
        self._ledgers[layer_id] = ledger
        return stamp

    def receive(self, layer_id: str, stamp: Stamp) -> Reception:
        """What to do with a receipt; `book` follows once it is in the journal."""
        return self._ledger(layer_id).receive(stamp)

    def book(self, layer_id: str, stamp: Stamp) -> None:
        """Note that a receipt is in the journal."""
        self._ledgers[layer_id] = self._ledger(layer_id).record(stamp)

    def unanswered(self) -> list[str]:
        """Layers that owe a receipt."""
        return [name for name, ledger in self._ledgers.items() if ledger.in_flight]

    def _ledger(self, layer_id: str) -> ReceiptLedger:
        return self._ledgers.get(layer_id, ReceiptLedger(self._run_epoch, self._term))
