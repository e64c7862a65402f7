"""The seeds of one call of a fused kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper_ray.kernels.form import Form, Layout


@dataclass(frozen=True, slots=True)
class Seeds:
    """The seeds of one call.

    `ids` (rows,) int64 are blended, those of alpha 0 are passed over; the others are (seeds,):
    `alpha` float32, `starts` and `sizes` int64, `slots` int32, `faults` float32, which is set to 1
    for a seed whose output is not finite. `columns`, `kept`, `padding` and `own` are those of
    ChunkRows. `listed_slots` int64 and `listed_alpha` are those of `ids`, (rows,) both.
    `dense` says that `ids` are all seeds, in order, of chunks of one size, `everyone` that they are
    all slots, in order.
    """

    form: Form
    layout: Layout
    ids: Tensor
    alpha: Tensor
    starts: Tensor
    sizes: Tensor
    slots: Tensor
    faults: Tensor
    columns: Tensor
    kept: Tensor
    padding: Tensor
    own: Tensor
    listed_slots: Tensor
    listed_alpha: Tensor
    dense: bool
    everyone: bool = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the kernels of listed seeds are told of them, in this order."""
        return self.ids, self.alpha, self.starts, self.sizes, self.slots

    @property
    def numbers(self) -> int:
        """Weights of a seed, those of `Form.packed`."""
        form, chunk, hidden = self.form, self.layout.chunk, self.layout.hidden
        matrices = chunk * hidden * (2 if form.chunk is not None else 1)
        return matrices + (hidden + chunk if form.biases else 0)

    def words(self, y: Tensor) -> bool:
        """Whether a thread for each seed blends y best: all are at work, chunks are machine words.

        For a tenth of the seeds or fewer the kernels of listed seeds are faster.
        """
        form, size = self.form, y.element_size()
        fit = self.dense and form.chunk is not None and form.read is None
        fit = fit and self.layout.word(size)
        return fit and y.data_ptr() % (self.layout.chunk * size) == 0

    def meta(self, y: Tensor) -> dict[str, Any]:
        """What the kernels are compiled for."""
        form, layout = self.form, self.layout
        return {
            "C": layout.chunk,
            "H": layout.hidden,
            "TILE": layout.tile,
            "TC": layout.columns,
            "HC": layout.hidden_columns,
            "ALIGN": layout.align,
            "DENSE": self.dense and layout.columns == layout.tile * layout.chunk,
            "CHUNK": form.chunk is not None,
            "READ": form.read is not None,
            "BIASES": form.biases,
            "RESIDUAL": form.residual,
            "ACT": form.activation,
            "IEEE": y.dtype == torch.float32,
        }
