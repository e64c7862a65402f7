"""One event of a run: what the bus carries, whoever carries it."""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from esper_ray.events.log import Events


class Kind(StrEnum):
    """What an event tells; the value is part of its type, and never changes its meaning."""

    TRANSITION = "seed.transition"
    """Applied transitions of one layer, made together: `data` is Events, or one row as a table."""
    COMMITTED = "checkpoint.committed"
    """A run commit exists, and every event before it is stored."""
    DAMAGED = "checkpoint.damaged"
    """A commit does not check out and was passed over."""
    STARTED = "run.started"
    """A run began, fresh or from a checkpoint that lies elsewhere."""
    REWOUND = "run.rewound"
    """A run went back: events of earlier run epochs past `kept_sequence` do not count any more."""
    FAULT = "run.fault"
    """Something went wrong and was dealt with."""


@dataclass(frozen=True, slots=True)
class Event:
    """`layer` is "" where a whole run is meant; `time` is RFC 3339 in UTC.

    `data` is Events where a layer's transitions travel together, else a table of JSON values.
    `seed_id` is given where the event is about one seed, or begins with one of several parts.
    """

    kind: Kind
    run: str
    layer: str
    run_epoch: int
    sequence: int
    time: str
    data: Mapping[str, Any] | Events
    shard: int = 0
    incarnation: int = 0
    seed_id: int | None = None

    @property
    def id(self) -> str:
        """Unique, and the same however often the event is told."""
        parts = (self.run, encoded(self.layer), *self.numbers)
        seed = () if self.seed_id is None else (self.seed_id,)
        return "/".join(str(part) for part in (*parts, *seed))

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """shard, run_epoch, incarnation, sequence."""
        return self.shard, self.run_epoch, self.incarnation, self.sequence

    @property
    def topic(self) -> str:
        """Where a bus with topics puts it; one function for both sides."""
        group = {Kind.TRANSITION: "transition", Kind.COMMITTED: "checkpoint"}
        group[Kind.DAMAGED] = "checkpoint"
        name = f"morphogenetic.{self.run}.event.{group.get(self.kind, 'run')}"
        return f"{name}.layer.{encoded(self.layer)}" if self.layer else name

    def __eq__(self, other: object) -> bool:
        """Equal in every field, NaN in the same places, and every column of the same type."""
        if not isinstance(other, Event):
            return NotImplemented
        return self._plain() == other._plain() and _same(self.data, other.data)

    def __hash__(self) -> int:
        return hash(self.id)

    def _plain(self) -> tuple[object, ...]:
        return self.kind, self.run, self.layer, self.numbers, self.seed_id, self.time


def _same(one: Mapping[str, Any] | Events, other: Mapping[str, Any] | Events) -> bool:
    if not isinstance(one, Events) or not isinstance(other, Events):
        return type(one) is type(other) and repr(one) == repr(other)
    return all(
        values == other.columns[name]
        if isinstance(values, list)
        else values.dtype == other.columns[name].dtype
        and np.array_equal(values, other.columns[name], equal_nan=values.dtype.kind == "f")
        for name, values in one.columns.items()
    )


def encoded(layer: str) -> str:
    """A layer id as one word of an address: percent-encoded, dots included."""
    return urllib.parse.quote(layer, safe="").replace(".", "%2E")


def decoded(word: str) -> str:
    """The inverse of `encoded`; ValueError for what it never writes."""
    layer = urllib.parse.unquote(word, errors="strict")
    if encoded(layer) != word:
        raise ValueError(f"{word!r} is no encoded layer id")
    return layer
