"""Which actor is which: stages in order, the shards of a stage side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from esper_ray.growth.shard import Shard


@dataclass(frozen=True, slots=True)
class Grid:
    """A run of one actor per shard of each stage; `shards[s]` of them make up stage s.

    Ranks count the shards of stage 0, then those of stage 1, and so on. What a stage puts out is
    the same on each of its shards, so a neighbour hears it from one of them.
    """

    shards: tuple[int, ...]

    @property
    def world(self) -> int:
        """Number of actors."""
        return sum(self.shards)

    def rank(self, stage: int, shard: int) -> int:
        """Number of an actor."""
        return sum(self.shards[:stage]) + shard

    def place(self, rank: int) -> tuple[int, Shard]:
        """Stage and shard of an actor."""
        for stage, count in enumerate(self.shards):
            if rank < count:
                return stage, Shard(rank, count)
            rank -= count
        raise IndexError(f"there are {self.world} actors")

    def ranks(self, stage: int) -> range:
        """The actors of a stage, in the order of its shards."""
        first = self.rank(stage, 0)
        return range(first, first + self.shards[stage])

    def source(self, rank: int, stage: int) -> int:
        """Whom of a neighbouring stage an actor hears its tensors from."""
        _, shard = self.place(rank)
        return self.rank(stage, shard.index % self.shards[stage])

    def hearers(self, rank: int, stage: int) -> Sequence[int]:
        """Who of a neighbouring stage hears its tensors from an actor."""
        return [other for other in self.ranks(stage) if self.source(other, self._of(rank)) == rank]

    def _of(self, rank: int) -> int:
        return self.place(rank)[0]
