"""Between a layer's seeds and the fused kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from esper_ray.errors import ConfigError
from esper_ray.kernels import cpu_blend
from esper_ray.kernels.form import TRITON_DTYPES, Form, Layout, alignment
from esper_ray.kernels.seeds import Seeds
from esper_ray.seeds import ChunkRows

if TYPE_CHECKING:
    from esper_ray.layers.seed_holder import SeedHolder


class FusedBlend:
    """Blends by one kernel what the blueprint and the chunk manager would do in many steps."""

    def __init__(self, layer: SeedHolder, kernel: str) -> None:
        form = layer.bank.kind.fused
        if form is None:
            raise ConfigError("this blueprint has no fused kernel", "choose the kernel torch")
        chunk = layer.chunks.chunk_width
        self._layer, self._form, self._kernel = layer, form, kernel
        self._told: tuple[ChunkRows, Seeds] | None = None
        align = alignment([*layer.chunks.sizes.tolist(), chunk])
        self._layout = Layout.of(chunk, layer.bank.shape.hidden, align)

    def fits(self, h: Tensor) -> bool:
        """Whether the kernel takes an output of this kind."""
        if self._kernel == "cpu":
            same = all(w.dtype == h.dtype for w in self._layer.bank.weights.values())
            return same and h.dtype in (torch.float32, torch.float64) and h.is_contiguous()
        return h.dtype in TRITON_DTYPES and h.is_contiguous()

    def blend(self, h: Tensor, u: Tensor | None, rows: ChunkRows, in_place: bool) -> Tensor:
        """h (..., width) with the seeds of `rows` blended in; u (samples, inputs) or None."""
        weights, seeds = self._layer.bank.weights, self._seeds(rows)
        packed = torch.cat([weights[name].flatten(1) for name in self._form.packed], 1)
        z = (
            None
            if u is None
            else _side_by_side(weights, self._form, seeds.listed_slots, u, h.dtype)
        )
        if self._kernel == "cpu":
            return cpu_blend.blend(h, z, packed, seeds, in_place)
        from esper_ray.kernels import blend

        return blend.blend(h, z, packed.float(), seeds, in_place)

    def _seeds(self, rows: ChunkRows) -> Seeds:
        """What the kernel is told of the listed seeds; made anew only when the list is."""
        if self._told is None or self._told[0] is not rows:
            layer = self._layer
            self._told = (
                rows,
                Seeds(
                    self._form,
                    self._layout,
                    rows.ids,
                    layer.state.alpha,
                    layer.chunks.starts,
                    layer.chunks.sizes,
                    layer.bank.slot_of_seed,
                    layer.faults,
                    rows.columns,
                    rows.kept,
                    rows.own,
                    layer.bank.slots(rows.ids),
                    layer.state.alpha.index_select(0, rows.ids),
                    rows.whole,
                ),
            )
        return self._told[1]


def _side_by_side(
    weights: torch.nn.ParameterDict, form: Form, slots: Tensor, u: Tensor, dtype: torch.dtype
) -> Tensor:
    """(samples, rows * hidden): what every seed makes of the same u, as one matrix product."""
    own = weights[str(form.read)].index_select(0, slots).to(dtype)  # (rows, inputs, hidden)
    side: Tensor = own.transpose(0, 1).flatten(1)
    return torch.mm(u.to(dtype), side)
