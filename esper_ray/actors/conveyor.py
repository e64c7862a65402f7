"""What an actor exchanges with its neighbours and with the other shards of its stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from esper_ray.actors.grid import Grid
from esper_ray.actors.transport import Receive, Send, Tag, Transport


@dataclass(slots=True)
class StageShards:
    """The shards of one stage, as actor `rank` sees them; see `layers.columns.Shards`.

    Each message of a step has a number of its own. Only those of training are of one shape.
    """

    transport: Transport
    peers: Sequence[int]
    """Ranks of all shards of the stage, in order."""
    index: int
    _step: int = 0
    _number: int = 0
    _phase: str = "train"

    def begin(self, phase: str, step: int) -> None:
        """Start the messages of a step, or of an evaluation."""
        self._phase, self._step, self._number = phase, step, 0

    def gather(self, name: str, own: Tensor) -> list[Tensor]:
        """See Shards."""
        tag = Tag(f"{self._phase} {name}", self._step, self._number, self._phase == "train")
        self._number += 1
        others = [rank for shard, rank in enumerate(self.peers) if shard != self.index]
        parts = self.transport.exchange(
            [Send(rank, tag, own) for rank in others], [Receive(rank, tag) for rank in others]
        )
        parts.insert(self.index, own)
        return parts


@dataclass(slots=True)
class Conveyor:
    """Takes a stage's tensors from one neighbour and passes its results on to the other.

    Results wait until the next turn, so that what is sent and what is awaited go together.
    """

    transport: Transport
    grid: Grid
    rank: int
    _sends: list[Send] = field(default_factory=list)

    def turn(self, tag: Tag, source: int | None) -> Tensor | None:
        """Send what waits; what stage `source` sends under that tag, None without a stage."""
        sends, self._sends = self._sends, []
        receives = [] if source is None else [Receive(self.grid.source(self.rank, source), tag)]
        received = self.transport.exchange(sends, receives)
        return received[0] if received else None

    def put(self, tag: Tag, target: int | None, result: Tensor | None) -> None:
        """Have a result sent to all of stage `target` that hear it from here."""
        if target is not None and result is not None:
            self._sends += [
                Send(rank, tag, result) for rank in self.grid.hearers(self.rank, target)
            ]

    def flush(self) -> None:
        """Send what waits."""
        sends, self._sends = self._sends, []
        self.transport.exchange(sends, [])
