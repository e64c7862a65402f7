"""Between a layer's seeds and the fused kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

import torch
from torch import Tensor, nn

from esper_ray.errors import ConfigError
from esper_ray.kernels import cpu_blend
from esper_ray.kernels.form import TRITON_DTYPES, Layout, alignment
from esper_ray.kernels.seeds import Seeds
from esper_ray.seeds import ChunkRows

if TYPE_CHECKING:
    from esper_ray.layers.seed_holder import SeedHolder


CPU_BLOCK: Final = 1024
"""Seeds that a CPU takes at once, so that what it computes for them stays in its caches."""


class FusedBlend:
    """Blends by one kernel what the blueprint and the chunk manager would do in many steps."""

    def __init__(self, layer: SeedHolder, kernel: str) -> None:
        form = layer.bank.kind.fused
        if form is None:
            raise ConfigError("this blueprint has no fused kernel", "choose the kernel torch")
        chunk = layer.chunks.chunk_width
        self._layer, self._form, self._kernel = layer, form, kernel
        self._told: tuple[ChunkRows, list[Seeds]] | None = None
        align = alignment([*layer.chunks.sizes.tolist(), chunk])
        self._layout = Layout.of(chunk, layer.bank.shape.hidden, align)

    def fits(self, h: Tensor) -> bool:
        """Whether the kernel takes an output of this kind."""
        if self._kernel == "cpu":
            dtype = h.dtype
            exact = dtype in (torch.float32, torch.float64) and h.is_contiguous()
            return exact and all(w.dtype == dtype for w in self._weights())
        fine = h.dtype in TRITON_DTYPES and h.is_contiguous() and h.numel() > 0
        return fine and self._layout.held(h.dtype.itemsize)

    def blend(self, h: Tensor, u: Tensor | None, rows: ChunkRows, in_place: bool) -> Tensor:
        """h (..., width) with the seeds of `rows` blended in; u (samples, inputs) or None."""
        own = self._weights()
        if self._kernel == "cpu":
            for seeds in self._seeds(rows):
                h = cpu_blend.blend(h, self._read(seeds, u, h.dtype), own, seeds, in_place)
                in_place = True  # what comes next writes over what came out here
            return h
        from esper_ray.kernels import blend

        [seeds] = self._seeds(rows)
        return blend.blend(h, self._read(seeds, u, h.dtype), own, seeds, in_place)

    def _weights(self) -> list[nn.Parameter]:
        """What `Form.packed` names, as it is now."""
        weights = self._layer.bank.weights._parameters  # weights[name] costs ten times as much
        return [cast(nn.Parameter, weights[name]) for name in self._form.packed]

    def _read(self, seeds: Seeds, u: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """(samples, rows * hidden): what every seed makes of the same u, as one matrix product."""
        if u is None:
            return None
        weight = self._layer.bank.weights[str(self._form.read)]
        own = weight if seeds.everyone else weight.index_select(0, seeds.listed_slots)
        side = own.transpose(0, 1)  # (inputs, rows, hidden)
        side = side.to(dtype, memory_format=torch.contiguous_format)
        return torch.mm(u.to(dtype), side.flatten(1))

    def _seeds(self, rows: ChunkRows) -> list[Seeds]:
        """What the kernel is told of the listed seeds; made anew only when the list is."""
        if self._told is None or self._told[0] is not rows:
            blocks = [rows]
            if self._kernel == "cpu" and len(rows) > CPU_BLOCK:
                blocks = [self._layer.chunks.rows(ids) for ids in torch.split(rows.ids, CPU_BLOCK)]
            self._told = rows, [self._tell(block) for block in blocks]
        return self._told[1]

    def _tell(self, rows: ChunkRows) -> Seeds:
        layer = self._layer
        return Seeds(
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
            rows.padding,
            rows.own,
            layer.bank.slots(rows.ids),
            layer.state.alpha.index_select(0, rows.ids),
            rows.whole,
            rows.whole and layer.bank.everyone,
        )
