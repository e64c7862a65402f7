"""What must hold in every state of the protocol model, and what rest is."""

from __future__ import annotations

from tests.model.world import Layer, Rows, World, fold, valid_entries


def breach(first: Rows, world: World) -> str:
    """Words for the first invariant that does not hold; empty if all do.

    I1 every change is logged at most once, and in the outbox until it is; I2 a change meets the
    state and generation it was meant for (checked as it happens); I3 what is acknowledged is in
    the log; I4 a rewind leaves nothing of a superseded epoch; I5 the table is obeyed, terminal
    states are left by replant only (checked as it happens); I7 a batch is answered by its own
    receipt (checked as it happens).
    """
    if world.breach:
        return world.breach
    names = [(entry.stamp.run_epoch, entry.stamp.number) for entry in world.log]
    if len(set(names)) != len(names):
        return "I1: a receipt is in the log twice"
    if fold(first, valid_entries(world, world.commit.position)) != world.commit.rows:
        return "I4: a run commit's state is not its log"
    return "" if world.layer is None else _layer_breach(first, world, world.layer)


def _layer_breach(first: Rows, world: World, layer: Layer) -> str:
    logged = valid_entries(world, len(world.log))
    in_log = {entry.stamp for entry in logged}
    outbox = layer.inbox.outbox
    waiting = {receipt.stamp for receipt in outbox} - in_log
    for message in world.network:
        if message.kind == "ack" and message.content in waiting:
            return "I3: a receipt is acknowledged and not in the log"
    if any(stamp.run_epoch != world.run_epoch for stamp in waiting):
        return "I4: the layer applied a batch of another run epoch"
    open_receipts = [receipt for receipt in outbox if receipt.stamp in waiting]
    if fold(first, logged + open_receipts) != layer.rows:
        return "I1: the layer's state is not its log and outbox"
    return ""


def at_rest(first: Rows, world: World) -> bool:
    """I6: both ends are up, nothing is on the way or open, and the log is the layer's state."""
    layer, coordinator = world.layer, world.coordinator
    if layer is None or coordinator is None or world.network:
        return False
    if layer.inbox.pending or layer.taken or layer.inbox.outbox:
        return False
    if coordinator.ledger.in_flight or coordinator.appending or coordinator.sent:
        return False
    return fold(first, valid_entries(world, len(world.log))) == layer.rows
