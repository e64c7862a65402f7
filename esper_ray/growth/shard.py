"""One layer on several actors: each holds some of its chunks, with their rows of the host.

Column parallelism: Shoeybi et al., Megatron-LM, arXiv 1909.08053, section 3, with the output put
together again, so that whatever follows the layer sees all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import nn

from esper_ray.layers.mlp import elementwise
from esper_ray.seeds.chunks import chunk_bounds

SPLIT: Final = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True)
class Shard:
    """Number `index` of the `count` actors that share a stage's layers."""

    index: int = 0
    count: int = 1

    def seeds(self, num_seeds: int) -> tuple[int, int]:
        """First of its seeds and the one after its last, of a layer of `num_seeds`."""
        return seed_bounds(num_seeds, self.count)[self.index]


WHOLE: Final = Shard()
"""The one actor of a stage that is not split."""


def seed_bounds(num_seeds: int, shards: int) -> list[tuple[int, int]]:
    """First seed and the one after the last of every shard."""
    return list(pairwise(k * num_seeds // shards for k in range(shards + 1)))


@dataclass(frozen=True, slots=True)
class LayerPart:
    """What a shard holds of a layer: seeds `first` to `last` - 1, and the features they divide."""

    first: int
    last: int
    bounds: NDArray[np.int64]
    """(its seeds + 1,) first feature of each chunk in the whole layer, and the end."""
    chunk_width: int
    """Features of the widest chunk of the whole layer."""

    @classmethod
    def of(cls, width: int, num_seeds: int, sizes: Sequence[int] | None, shard: Shard) -> LayerPart:
        """The part of a shard in a layer of `width` features; `sizes` as for ChunkManager."""
        bounds = chunk_bounds(width, num_seeds, sizes)
        first, last = shard.seeds(num_seeds)
        return cls(first, last, bounds[first : last + 1], int(np.diff(bounds).max()))

    @property
    def seeds(self) -> int:
        """How many."""
        return self.last - self.first

    @property
    def rows(self) -> slice:
        """Its features, which are rows of the host's weights."""
        return slice(int(self.bounds[0]), int(self.bounds[-1]))

    @property
    def width(self) -> int:
        """How many features."""
        return int(self.rows.stop - self.rows.start)

    @property
    def sizes(self) -> list[int]:
        """Features of each chunk."""
        return [int(size) for size in np.diff(self.bounds)]


def why_whole(module: nn.Module) -> str:
    """Why a host cannot be split over several actors; nothing where it can."""
    leaves = list(module) if isinstance(module, nn.Sequential) and len(module) else [module]
    host, after = leaves[0], leaves[1:]
    if type(host) not in SPLIT:
        return f"a {type(host).__name__} has no rows to divide"
    if getattr(host, "groups", 1) != 1:
        return "its channels are in groups"
    if any(not elementwise(m) or next(m.parameters(), None) is not None for m in after):
        return "what follows its first module looks at several features"
    return ""


def split_host(module: nn.Module, rows: slice) -> None:
    """Keep some rows of a host's weights, that is some features of its output, in place."""
    host: Any = module[0] if isinstance(module, nn.Sequential) else module
    for name in ("weight", "bias"):
        whole = getattr(host, name)
        if whole is not None:
            setattr(host, name, nn.Parameter(whole.detach()[rows].clone()))
    size = "out_features" if isinstance(host, nn.Linear) else "out_channels"
    setattr(host, size, rows.stop - rows.start)
