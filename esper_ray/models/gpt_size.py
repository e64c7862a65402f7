"""Sizes of the byte GPT, and how wide its MLPs are at a given number of parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class GPTSize:
    """`mlp_width` is the number of hidden units of each MLP, four times `width` unless given."""

    layers: int
    width: int
    heads: int
    context: int
    mlp_width: int | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that no model can have."""
        sizes = (self.layers, self.width, self.heads, self.context, self.mlp_units)
        if min(sizes) < 1:
            raise ValueError(f"every size must be at least 1, got {self}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")

    @property
    def usual_mlp_units(self) -> int:
        """Hidden units of an MLP whose width was not chosen."""
        return 4 * self.width

    @property
    def mlp_units(self) -> int:
        """Hidden units of each MLP."""
        return self.usual_mlp_units if self.mlp_width is None else self.mlp_width


SMALL: Final = GPTSize(layers=4, width=128, heads=4, context=256)
"""858,880 parameters."""

LARGE: Final = GPTSize(layers=6, width=512, heads=8, context=256)
"""19,177,472 parameters."""


def same_parameters_mlp_width(size: GPTSize, extra: int, multiple: int = 1) -> int:
    """The `mlp_width` whose model has nearest to `extra` parameters more than one of `size`.

    Only multiples of `multiple` count; 8 keeps bfloat16 products on fast kernels.
    """
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1, got {multiple}")
    unit = size.layers * (2 * size.width + 1)  # a column in, a column out and a bias, per layer
    return multiple * max(1, round((size.mlp_units + extra / unit) / multiple))
