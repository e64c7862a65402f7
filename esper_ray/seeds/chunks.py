"""How the features of a layer are divided among its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from esper_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """Where the chunks of some seeds lie among the features.

    `columns` (rows * chunk_width,) says what to read, past its end a short chunk reads its last
    feature again. `kept` are the entries of `columns` that are a chunk's own, `padding` the others,
    and `own` says which features are kept: only they may be written. `whole` means every feature
    in order.
    """

    ids: Tensor
    columns: Tensor
    kept: Tensor
    padding: Tensor
    own: Tensor
    whole: bool

    def __len__(self) -> int:
        return len(self.ids)


class ChunkManager(nn.Module):
    """Divides the last dimension, `width` features, into one chunk per seed.

    With `q, r = divmod(width, num_seeds)` chunk i holds `q + (i < r)` features and starts at
    `i * q + min(i, r)`, unless `sizes` names the features of each. Raises ConfigError, a
    ValueError, where a chunk would be empty or `sizes` do not add up. Packed chunks are
    `chunk_width` features wide, by default as many as the widest has.
    """

    starts: Tensor
    sizes: Tensor
    _columns: Tensor
    _slots: Tensor

    def __init__(
        self,
        width: int,
        num_seeds: int,
        sizes: Sequence[int] | None = None,
        chunk_width: int | None = None,
    ) -> None:
        super().__init__()
        bounds = chunk_bounds(width, num_seeds, sizes)
        self.width, self.num_seeds, self._bounds = width, num_seeds, bounds
        lengths = torch.from_numpy(np.diff(bounds))
        widest = int(lengths.max())
        self.chunk_width = chunk_width or widest  # of the packed form, short chunks are padded
        if self.chunk_width < widest:
            raise ConfigError(f"a chunk of {widest} features is wider than {self.chunk_width}")
        self.even = bool((lengths == self.chunk_width).all())
        starts = torch.from_numpy(bounds[:-1].copy())
        offset = torch.arange(self.chunk_width)
        columns = (starts[:, None] + offset).clamp(max=width - 1)  # (seeds, chunk_width)
        owner = torch.repeat_interleave(torch.arange(num_seeds), lengths)  # (width,)
        slots = owner * self.chunk_width + torch.arange(width) - starts[owner]
        for name, value in (("starts", starts), ("sizes", lengths)):
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("_columns", columns.flatten(), persistent=False)
        self.register_buffer("_slots", slots, persistent=False)
        self.register_buffer("valid", offset < lengths[:, None], persistent=False)

    @property
    def owner(self) -> Tensor:
        """(width,) int64 seed of each feature."""
        return self._slots // self.chunk_width

    valid: Tensor
    """(seeds, chunk_width) bool, False where a short chunk is padded."""

    def bounds(self, seed_id: int) -> tuple[int, int]:
        """First feature of the seed's chunk and the one after its last; IndexError if unknown."""
        if not 0 <= seed_id < self.num_seeds:
            raise IndexError(f"seed {seed_id} is not in 0..{self.num_seeds - 1}")
        return int(self._bounds[seed_id]), int(self._bounds[seed_id + 1])

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Views of x (..., width), one per seed."""
        self._check_width(x)
        views: tuple[Tensor, ...] = torch.split(x, np.diff(self._bounds).tolist(), dim=-1)
        return views

    def concatenate(self, chunks: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`, bit for bit."""
        return torch.cat(tuple(chunks), dim=-1)

    def rows(self, ids: Tensor) -> ChunkRows:
        """Where the chunks of seeds `ids` (rows,) lie; not for use inside a step."""
        columns = self._columns.view(self.num_seeds, -1).index_select(0, ids).flatten()
        valid = self.valid.index_select(0, ids).flatten()
        kept, padding = valid.nonzero().flatten(), (~valid).nonzero().flatten()
        whole = self.even and len(ids) == self.num_seeds and bool((ids.diff() == 1).all())
        return ChunkRows(ids, columns, kept, padding, columns.index_select(0, kept), whole)

    def take(self, x: Tensor, rows: ChunkRows) -> Tensor:
        """Chunks (samples, rows, chunk_width) of x (samples, width), padded with zeros."""
        self._check_width(x)
        shape = (x.shape[0], len(rows), self.chunk_width)
        if rows.whole:
            return x.reshape(shape)
        taken = x.index_select(-1, rows.columns).view(shape)
        return taken if self.even else taken.masked_fill(~self.valid.index_select(0, rows.ids), 0.0)

    def add(self, x: Tensor, rows: ChunkRows, delta: Tensor) -> Tensor:
        """x (samples, width) with delta (samples, rows, chunk_width) added to the chunks."""
        flat = delta.flatten(1)
        if rows.whole:
            return x + flat
        return x.index_add(-1, rows.own, flat if self.even else flat.index_select(-1, rows.kept))

    def pack(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., seeds, chunk_width), short chunks padded with zeros."""
        self._check_width(x)
        shape = (*x.shape[:-1], self.num_seeds, self.chunk_width)
        if self.even:
            return x.reshape(shape)
        packed = x.index_select(-1, self._columns).view(shape)
        return packed.masked_fill(~self.valid, 0.0)

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse of `pack`; padding is dropped."""
        flat = packed.flatten(-2)
        return flat if self.even else flat.index_select(-1, self._slots)

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.width:  # a wider x would lose features in silence
            raise ValueError(f"got {x.shape[-1]} features, but the chunks divide {self.width}")


def chunk_bounds(
    width: int, num_seeds: int, sizes: Sequence[int] | None = None
) -> NDArray[np.int64]:
    """(seeds + 1,) first feature of every chunk of a ChunkManager, and `width`."""
    if width < 1 or num_seeds < 1 or num_seeds > width:
        raise ConfigError(
            f"cannot divide {width} features among {num_seeds} seeds",
            f"choose between 1 and {max(width, 1)} seeds for this layer",
        )
    if sizes is None:
        least, larger = divmod(width, num_seeds)
        index = np.arange(num_seeds + 1)
        return index * least + np.minimum(index, larger)
    if len(sizes) != num_seeds or min(sizes) < 1 or sum(sizes) != width:
        raise ConfigError(
            f"{len(sizes)} chunk sizes, sum {sum(sizes)}, least {min(sizes, default=0)}, do not "
            f"divide {width} features among {num_seeds} seeds",
            "give one size of at least 1 per seed, with the layer's width as their sum",
        )
    return np.concatenate(([0], np.cumsum(sizes)))
