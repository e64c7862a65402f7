"""What the fused kernels can compute, and where chunks and weights lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch

TRITON_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)

_WIDE_BLOCK: Final = 64
_WIDE_MATRIX: Final = 2048
_THREAD_MATRIX: Final = 32
_LARGEST: Final = {2: 8192, 4: 2048}
"""Bytes per number -> entries of a tile's matrices, as compiled for compute capability 9.0."""

Activation = Literal["identity", "relu", "gelu"]


@dataclass(frozen=True, slots=True)
class Form:
    """A two-layer blueprint: f = act(x w_chunk + u w_in + b_in) w_out + b_out.

    `chunk` names the weight that reads the chunk, `read` the one that reads the host's input, each
    None where that is not read. Without `biases` both are left out. The seed adds f to its chunk
    where it is `residual`, else f - x.
    """

    chunk: str | None
    read: str | None
    activation: Activation
    biases: bool = True
    residual: bool = True

    @property
    def packed(self) -> tuple[str, ...]:
        """Weights that the kernels read, in the order in which they are packed."""
        first = (self.chunk,) if self.chunk else ()
        return (*first, "b_in", "w_out", "b_out") if self.biases else (*first, "w_out")


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes that a kernel is compiled for.

    `tile` seeds of the list share a program, with `columns` features and `hidden_columns` hidden
    units between them, both padded; `align` divides every chunk's start, size and width.
    """

    chunk: int
    hidden: int
    align: int
    tile: int
    columns: int
    hidden_columns: int

    @classmethod
    def of(cls, chunk: int, hidden: int, align: int) -> Layout:
        """Enough seeds per program to fill the 16 columns that a matrix unit takes at least."""
        width = power(chunk)
        tile = max(1, 16 // width)
        units = max(power(hidden), 16 // tile)
        return cls(chunk, hidden, align, tile, tile * width, tile * units)

    @property
    def wide(self) -> bool:
        """Whether the matrices of a seed are more than a program should hold at once."""
        return self.tile == 1 and self.columns * self.hidden_columns >= _WIDE_MATRIX

    def held(self, itemsize: int) -> bool:
        """Whether a program can hold its share of numbers of `itemsize` bytes.

        Sizes that pass need at most some 96 KiB of shared memory, which every card has since
        compute capability 8.0.
        """
        matrix = self.columns * self.hidden_columns
        return self.columns * itemsize <= 256 and (self.wide or matrix <= _LARGEST[itemsize])

    def word(self, itemsize: int) -> bool:
        """Whether chunks are machine words, and a thread can hold all weights of a seed."""
        exact = self.align == self.chunk and self.chunk * itemsize in (2, 4, 8)
        return exact and self.chunk * self.hidden <= _THREAD_MATRIX

    @property
    def block(self) -> int:
        """Hidden units that a program of the wide kernels takes at once."""
        return min(self.hidden_columns, _WIDE_BLOCK)


def alignment(sizes: list[int]) -> int:
    """The largest power of two, at most 16, that divides all of `sizes` and so every start."""
    found = 16
    for size in set(sizes):
        found = min(found, size & -size)
    return found


def power(number: int) -> int:
    """The smallest power of two that is not less than `number`."""
    return 1 << max(number - 1, 0).bit_length()
