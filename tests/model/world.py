"""States of the protocol model: a layer, its coordinator, what is stored and what is on the way."""

from __future__ import annotations

from typing import Final, NamedTuple

from esper_ray.actors.protocol import LayerInbox, ReceiptLedger, Stamp, Stamped
from esper_ray.lifecycle import TERMINAL_STATES, ExtendedLifecycle, StateTransition

_S = ExtendedLifecycle


class Row(NamedTuple):
    """What compare-and-set compares."""

    state: ExtendedLifecycle
    generation: int

    @property
    def words(self) -> str:
        """For traces: state and generation."""
        return f"{self.state.name}/{self.generation}"


Rows = tuple[Row, ...]


class Move(NamedTuple):
    """Body of a batch: one seed from one row to another."""

    seed: int
    expected: Row
    target: Row


Batch = Stamped[Move]
Receipt = Stamped[Move | None]
"""Body: the move, or None where compare-and-set refused it."""
Inbox = LayerInbox[Move, Move | None]


class Message(NamedTuple):
    """On the way; `content` fits the name of the method that receives it."""

    kind: str
    content: Batch | Receipt | Stamp


class Layer(NamedTuple):
    """One process of the layer; `taken` is the batch between `take` and `applied`."""

    inbox: Inbox
    rows: Rows
    taken: Batch | None = None


class Coordinator(NamedTuple):
    """`sent` is its own batch in flight, `appending` the receipt whose append is awaited."""

    ledger: ReceiptLedger
    sent: Batch | None = None
    appending: Receipt | None = None


class Staged(NamedTuple):
    """A layer manifest: rows at a step boundary and the last number taken by then."""

    rows: Rows
    number: int


class Commit(NamedTuple):
    """A run commit: rows and log position together."""

    rows: Rows
    position: int


class Budget(NamedTuple):
    """How often each thing may still happen; makes the space finite."""

    batches: int
    coordinator_crashes: int
    layer_crashes: int
    duplicates: int
    commits: int


class World(NamedTuple):
    """Everything; None is a process that is down. `starts[e]`: log position where epoch e began."""

    layer: Layer | None
    zombie: Layer | None
    coordinator: Coordinator | None
    network: frozenset[Message]
    log: tuple[Receipt, ...]
    commit: Commit
    starts: tuple[int, ...]
    staged: Staged | None
    term: int
    budget: Budget
    breach: str = ""

    @property
    def run_epoch(self) -> int:
        """Newest run epoch on storage."""
        return len(self.starts) - 1


def targets(row: Row, states: frozenset[ExtendedLifecycle]) -> list[Row]:
    """Where a row may go: the product's table within `states`, and replant."""
    if row.state in TERMINAL_STATES:
        return [Row(_S.DORMANT, row.generation + 1)]
    legal = StateTransition.VALID_TRANSITIONS[row.state]
    return [Row(state, row.generation) for state in legal if state in states]


ALL_STATES: Final = frozenset(ExtendedLifecycle)


def is_legal(before: Row, after: Row) -> bool:
    """Whether the table, or replant, allows a change."""
    return after in targets(before, ALL_STATES)


def valid_entries(world: World, upto: int) -> list[Receipt]:
    """The log as a reader folds it: entries that no later run epoch superseded."""
    return [
        entry
        for i, entry in enumerate(world.log[:upto])
        if all(i < start for start in world.starts[entry.stamp.run_epoch + 1 :])
    ]


def fold(rows: Rows, entries: list[Receipt]) -> Rows | None:
    """Rows after the entries; None if one of them does not start where its seed is."""
    for entry in entries:
        if entry.body is None:
            continue
        seed, expected, target = entry.body
        if rows[seed] != expected:
            return None
        rows = (*rows[:seed], target, *rows[seed + 1 :])
    return rows


def words(message: Message) -> str:
    """For traces: kind, stamp and content."""
    content = message.content
    stamp = content if isinstance(content, Stamp) else content.stamp
    text = f"{message.kind} {name(stamp)}"
    if isinstance(content, Stamp):
        return text
    if content.body is None:
        return f"{text} (nothing applied)"
    seed, before, after = content.body
    return f"{text} (seed {seed}: {before.words} -> {after.words})"


def name(stamp: Stamp) -> str:
    """For traces: run epoch, term and number."""
    return f"{stamp.run_epoch}.{stamp.term}.{stamp.number}"
