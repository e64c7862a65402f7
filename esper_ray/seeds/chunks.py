"""How the features of a layer are divided among its seeds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from esper_ray.errors import ConfigError


class ChunkManager(nn.Module):
    """Divides the last dimension, `width` features, into one chunk per seed.

    With `q, r = divmod(width, num_seeds)` chunk i holds `q + (i < r)` features and starts at
    `i * q + min(i, r)`. Raises ConfigError, a ValueError, where a chunk would be empty.
    """

    starts: Tensor
    sizes: Tensor
    _columns: Tensor
    _slots: Tensor

    def __init__(self, width: int, num_seeds: int) -> None:
        super().__init__()
        if width < 1 or num_seeds < 1 or num_seeds > width:
            raise ConfigError(
                f"cannot divide {width} features among {num_seeds} seeds",
                f"choose between 1 and {max(width, 1)} seeds for this layer",
            )
        self.width, self.num_seeds = width, num_seeds
        least, larger = divmod(width, num_seeds)
        self.chunk_width = least + (larger > 0)  # of the packed form, short chunks are padded
        self.even = larger == 0
        index = torch.arange(num_seeds)
        starts = index * least + index.clamp(max=larger)
        sizes = least + (index < larger).long()
        offset = torch.arange(self.chunk_width)
        columns = (starts[:, None] + offset).clamp(max=width - 1)  # (seeds, chunk_width)
        owner = torch.repeat_interleave(index, sizes)  # (width,)
        slots = owner * self.chunk_width + torch.arange(width) - starts[owner]
        for name, value in (("starts", starts), ("sizes", sizes)):
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("_columns", columns.flatten(), persistent=False)
        self.register_buffer("_slots", slots, persistent=False)
        self.register_buffer("valid", offset < sizes[:, None], persistent=False)

    valid: Tensor
    """(seeds, chunk_width) bool, False where a short chunk is padded."""

    def bounds(self, seed_id: int) -> tuple[int, int]:
        """First feature of the seed's chunk and the one after its last; IndexError if unknown."""
        if not 0 <= seed_id < self.num_seeds:
            raise IndexError(f"seed {seed_id} is not in 0..{self.num_seeds - 1}")
        least, larger = divmod(self.width, self.num_seeds)
        start = seed_id * least + min(seed_id, larger)
        return start, start + least + (seed_id < larger)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Views of x (..., width), one per seed."""
        self._check_width(x)
        views: tuple[Tensor, ...] = torch.split(x, self.sizes.tolist(), dim=-1)
        return views

    def concatenate(self, chunks: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`, bit for bit."""
        return torch.cat(tuple(chunks), dim=-1)

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
