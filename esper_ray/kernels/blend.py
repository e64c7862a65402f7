"""The fused blend as a differentiable function of the output, the hidden input and the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from esper_ray.kernels.form import Layout
from esper_ray.kernels.ownership import holders, unshared
from esper_ray.kernels.seeds import Seeds
from esper_ray.kernels.triton_blend import blend_backward_kernel, blend_kernel, moments_kernel
from esper_ray.kernels.triton_wide import (
    wide_blend_kernel,
    wide_chunk_gradient_kernel,
    wide_weight_gradient_kernel,
)

_MULTIPROCESSORS = 132
WIDE_ROWS = 64
"""Rows that a program of the wide kernels takes at once."""


def blend(y: Tensor, z: Tensor | None, weights: Tensor, seeds: Seeds, in_place: bool) -> Tensor:
    """y (..., width) with the seeds blended in; samples are all but its last dimension.

    z (samples, rows * hidden), of the dtype of y, is what each seed of the list makes of the
    host's input, None where it reads none. weights (slots, n) float32 are packed in the order of
    `Form.packed`. `in_place` writes over y, which nobody may look at again, not even autograd.
    """
    result: Tensor = _Blend.apply(y, z, weights, seeds, in_place)  # type: ignore[no-untyped-call]
    return result


class _Blend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, z: Tensor | None, weights: Tensor, seeds: Seeds, in_place: bool
    ) -> Tensor:
        out = y.detach() if in_place else y.clone()
        y = out.view(-1, out.shape[-1])
        save = any(ctx.needs_input_grad[:3]) and seeds.form.chunk is not None
        tiles = -(-len(seeds.ids) // seeds.layout.tile)
        kept = y.new_empty((tiles, len(y), seeds.layout.columns) if save else (1,))
        read = out if z is None else z
        told = (weights, *seeds.tensors, seeds.faults, len(y), y.shape[1], len(seeds.ids))
        if seeds.layout.wide:
            wide_blend_kernel[(tiles, -(-len(y) // WIDE_ROWS))](
                out, read, kept, *told, SAVE=save, **_wide(seeds, y, weights)
            )
        else:
            rows, block, warps = _cut(len(y), tiles, seeds.layout)
            blend_kernel[(tiles, -(-len(y) // rows))](
                out, read, kept, *told, rows, P=weights.shape[1], BM=block, SAVE=save,
                num_warps=warps, num_stages=2, **seeds.meta(y),
            )  # fmt: skip
        ctx.seeds = seeds
        ctx.save_for_backward(kept, z, weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        kept, z, weights = ctx.saved_tensors
        seeds: Seeds = ctx.seeds
        own = unshared(holders(g)) and g.is_contiguous()
        writes = seeds.form.chunk is not None and not own
        gh = g.clone(memory_format=torch.contiguous_format) if writes else g.contiguous()
        g = gh.view(-1, gh.shape[-1])
        dz = None if z is None else torch.empty_like(z)
        own_sums = _wide_gradients if seeds.layout.wide else _gradients
        partial = own_sums(seeds, g, dz, z, kept, weights)
        dw = partial.sum(0)
        if not seeds.everyone:
            dw = torch.zeros_like(weights).index_copy_(0, seeds.listed_slots, dw)
        return gh, dz, dw, None, None


def _gradients(
    seeds: Seeds, g: Tensor, dz: Tensor | None, z: Tensor | None, kept: Tensor, weights: Tensor
) -> Tensor:
    """Write g and dz; (programs, rows, n) sums for the weights."""
    listed, tiles = len(seeds.ids), -(-len(seeds.ids) // seeds.layout.tile)
    rows, block, warps = _cut(len(g), tiles, seeds.layout)
    programs = -(-len(g) // rows)
    partial = weights.new_zeros(programs, listed, weights.shape[1])
    blend_backward_kernel[(tiles, programs)](
        g, g if dz is None else dz, g if z is None else z, kept, weights, partial, *seeds.tensors,
        len(g), g.shape[1], listed, rows, P=weights.shape[1], BM=block, num_warps=warps,
        num_stages=2, **seeds.meta(g),
    )  # fmt: skip
    return partial


def _wide_gradients(
    seeds: Seeds, g: Tensor, dz: Tensor | None, z: Tensor | None, kept: Tensor, weights: Tensor
) -> Tensor:
    """The same by the wide kernels; that of the weights first, since the other changes g."""
    listed, blocks = len(seeds.ids), -(-seeds.layout.hidden // seeds.layout.block)
    splits = max(1, -(-_MULTIPROCESSORS * 4 // (listed * blocks)))
    rows = -(-len(g) // splits // WIDE_ROWS) * WIDE_ROWS if len(g) > WIDE_ROWS else WIDE_ROWS
    programs = -(-len(g) // rows)
    partial = weights.new_zeros(programs, listed, weights.shape[1])
    read, sizes = g if z is None else z, (len(g), g.shape[1], listed)
    meta = _wide(seeds, g, weights)
    fewer = {} if seeds.form.chunk is not None else {"BM": WIDE_ROWS // 2}  # dz is written too
    wide_weight_gradient_kernel[(listed, programs, blocks)](
        g, g if dz is None else dz, read, kept, weights, partial, *seeds.tensors, *sizes, rows,
        **(meta | fewer),
    )  # fmt: skip
    if seeds.form.chunk is not None:
        wide_chunk_gradient_kernel[(listed, -(-len(g) // WIDE_ROWS))](
            g, read, kept, weights, *seeds.tensors, *sizes, **meta
        )
    return partial


def _wide(seeds: Seeds, y: Tensor, weights: Tensor) -> dict[str, Any]:
    """What the wide kernels are compiled for."""
    meta = {k: v for k, v in seeds.meta(y).items() if k not in ("TILE", "HC")}
    sizes = {"P": weights.shape[1], "HB": seeds.layout.block, "BM": WIDE_ROWS}
    return meta | sizes | {"num_warps": 4, "num_stages": 2}


def _cut(samples: int, tiles: int, layout: Layout) -> tuple[int, int, int]:
    """Rows per program, rows at a time, warps: enough programs to fill the chip, and no more,
    since each loads its weights anew."""
    block, warps = (32, 8) if layout.columns * layout.hidden_columns >= 8192 else (64, 4)
    blocks = -(-samples // block)
    splits = max(1, min(blocks, -(-_MULTIPROCESSORS * 16 // max(tiles, 1))))
    return -(-blocks // splits) * block, block, warps


def add_moments(
    y: Tensor, first: int, stride: int, shift: Tensor, total: Tensor | None, square: Tensor
) -> int:
    """Add sums over rows first, first + stride, ... of y (samples, width); how many those are.

    total (width,) takes those of y - shift, square those of its square; without total, square
    takes those of y * y.
    """
    rows = len(range(first, len(y), stride))
    block, width = (8, 256) if y.shape[1] >= 32_768 else (32, 64)
    moments_kernel[(-(-y.shape[1] // width),)](
        y, shift, square if total is None else total, square, rows, first, stride, y.shape[1],
        BM=block, BN=width, BOTH=total is not None, num_warps=4,
    )  # fmt: skip
    return rows
