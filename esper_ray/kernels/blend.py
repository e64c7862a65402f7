"""The fused blend as a differentiable function of the output, the hidden input and the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from esper_ray.kernels import launches
from esper_ray.kernels.ownership import holders, unshared
from esper_ray.kernels.seeds import Seeds
from esper_ray.kernels.triton_blend import moments_kernel


def blend(
    y: Tensor, z: Tensor | None, weights: Sequence[Tensor], seeds: Seeds, in_place: bool
) -> Tensor:
    """y (..., width) with the seeds blended in; samples are all but its last dimension.

    z (samples, rows * hidden), of the dtype of y, is what each seed of the list makes of the
    host's input, None where it reads none. `weights` are those of `Form.packed`, each (slots, ...)
    and contiguous. `in_place` may write over y: nobody looks at it again, not even autograd.
    """
    result: Tensor = _Blend.apply(y, z, seeds, in_place, *weights)  # type: ignore[no-untyped-call]
    return result


class _Blend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, z: Tensor | None, seeds: Seeds, in_place: bool, *weights: Tensor
    ) -> Tensor:
        save = any(ctx.needs_input_grad) and seeds.form.chunk is not None
        flat = y.detach().view(-1, y.shape[-1])
        own = [weight.detach() for weight in weights]
        ctx.words = seeds.words(y)
        if ctx.words:
            out, kept = launches.blend_words(flat, own, seeds, in_place, save)
        else:
            out = flat if in_place else flat.clone()
            kept = launches.blend_tiles(out, z, own, seeds, save)
        ctx.seeds = seeds
        ctx.save_for_backward(kept, z, *weights)
        return out.view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        kept, z, *weights = ctx.saved_tensors
        seeds: Seeds = ctx.seeds
        own = unshared(holders(g)) and g.is_contiguous()
        flat = g.contiguous().view(-1, g.shape[-1])
        dz = None if z is None else torch.empty_like(z)
        if ctx.words:
            if not seeds.words(flat):  # it begins in the midst of a word
                flat, own = flat.clone(), True
            gh, sums = launches.word_gradients(flat, kept, weights, seeds, own)
        else:
            gh = flat if own or seeds.form.chunk is None else flat.clone()
            sums = launches.tile_gradients(gh, dz, z, kept, weights, seeds)
        return gh.view(g.shape), dz, None, None, *launches.fold(sums, weights, seeds)


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
