"""The fused blend on a CPU: the same function as `triton_blend`, in few large operations.

Samples lie innermost, (rows, features, samples): the small product of each seed then runs over
contiguous samples, some four times faster than over strided ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from esper_ray.kernels.form import Form
from esper_ray.kernels.ownership import holders, unshared
from esper_ray.kernels.seeds import Seeds


def blend(
    y: Tensor, z: Tensor | None, weights: Sequence[Tensor], seeds: Seeds, in_place: bool
) -> Tensor:
    """As `esper_ray.kernels.blend.blend`, for y on a CPU and weights of its dtype, not packed."""
    result: Tensor = _Blend.apply(  # type: ignore[no-untyped-call]
        y, z, seeds, in_place, *weights
    )
    return result


class _Blend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, z: Tensor | None, seeds: Seeds, in_place: bool, *weights: Tensor
    ) -> Tensor:
        out = y.detach() if in_place else y.clone()
        y = out.view(-1, out.shape[-1])
        own, form = _Weights(weights, seeds), seeds.form
        x = _take(y, seeds)
        f = own.output(_act(own.hidden(x, z), form, in_place=True))
        if not form.residual:
            f -= x
        if not math.isfinite(float(f.sum())):  # on a CPU a look costs less than a branch-free form
            f = _contained(f, seeds)
        _put(y, torch.addcmul(x, f, own.alpha), seeds)
        ctx.seeds = seeds
        ctx.save_for_backward(x, z, *weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        alone = unshared(holders(g)) and g.is_contiguous()
        x, z, *weights = ctx.saved_tensors
        seeds: Seeds = ctx.seeds
        form, own = seeds.form, _Weights(weights, seeds)
        taken = _take(g.reshape(-1, g.shape[-1]), seeds)
        gf = taken * own.alpha
        u = own.hidden(x, z)
        gu = _slope(torch.bmm(own.w_out, gf), u, form)
        gu = torch.where(gu.isfinite(), gu, 0.0)
        grads = [torch.bmm(_act(u, form), gf.mT)]
        if form.biases:
            grads = [gu.sum(2), *grads, gf.sum(2)]
        gh = g
        if own.w_in is not None:
            grads = [torch.bmm(x, gu.mT), *grads]
            dx = torch.bmm(own.w_in, gu)
            dx = torch.where(dx.isfinite(), dx, 0.0)
            gh = g if alone else g.clone(memory_format=torch.contiguous_format)
            _put(gh.view(-1, gh.shape[-1]), taken + (dx if form.residual else dx - gf), seeds)
        dw = [
            torch.zeros_like(weight).index_copy_(0, seeds.listed_slots, grad)
            for weight, grad in zip(weights, grads, strict=True)
        ]
        dz = None if z is None else gu.permute(2, 0, 1).reshape_as(z)
        return gh, dz, None, None, *dw


class _Weights:
    """The weights of the listed seeds, rows first."""

    def __init__(self, weights: Sequence[Tensor], seeds: Seeds) -> None:
        form = seeds.form
        self.alpha = seeds.listed_alpha[:, None, None]
        rows = [weight.index_select(0, seeds.listed_slots) for weight in weights]
        self.w_in = rows.pop(0) if form.chunk else None  # (rows, chunk, hidden)
        self.b_in = rows.pop(0)[:, :, None] if form.biases else None
        self.w_out = rows.pop(0)  # (rows, hidden, chunk)
        self.b_out = rows.pop(0)[:, :, None] if form.biases else None

    def hidden(self, x: Tensor, z: Tensor | None) -> Tensor:
        """(rows, hidden, samples) before the activation."""
        read = None if z is None else z.view(len(z), len(x), self.w_out.shape[1]).permute(1, 2, 0)
        if read is not None and self.b_in is not None:
            read = read + self.b_in
        start = self.b_in if read is None else read
        if self.w_in is None:
            if start is None:
                raise ValueError("a form that reads nothing has nothing to compute")
            return start.clone() if start is self.b_in else start
        return _product(start, self.w_in.mT, x)

    def output(self, hidden: Tensor) -> Tensor:
        """(rows, chunk, samples)."""
        return _product(self.b_out, self.w_out.mT, hidden)


def _product(start: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a, b) if start is None else torch.baddbmm(start, a, b)


def _take(y: Tensor, seeds: Seeds) -> Tensor:
    """(rows, chunk, samples) chunks of y (samples, width), padded with zeros."""
    x = y.index_select(1, seeds.columns).t().contiguous()
    if len(seeds.padding):
        x.index_fill_(0, seeds.padding, 0.0)
    return x.view(len(seeds.ids), seeds.layout.chunk, len(y))


def _put(y: Tensor, chunks: Tensor, seeds: Seeds) -> None:
    """Write chunks (rows, chunk, samples) to where they lie in y (samples, width)."""
    flat = chunks.flatten(0, 1)
    if len(seeds.padding):
        flat = flat.index_select(0, seeds.kept)
    y.scatter_(1, seeds.own.expand(len(y), -1), flat.t())


def _contained(f: Tensor, seeds: Seeds) -> Tensor:
    """f with 0 for the seeds whose output is not finite, and a mark at each of them."""
    broken = ~f.isfinite().all(2).all(1)
    seeds.faults.index_fill_(0, seeds.ids[broken], 1.0)
    return torch.where(broken[:, None, None], 0.0, f)


def _act(u: Tensor, form: Form, in_place: bool = False) -> Tensor:
    if form.activation == "relu":
        return u.relu_() if in_place else u.relu()
    return torch.nn.functional.gelu(u) if form.activation == "gelu" else u


def _slope(g: Tensor, u: Tensor, form: Form) -> Tensor:
    """g times the slope of the activation at u."""
    if form.activation == "relu":
        return g * (u > 0)
    if form.activation == "gelu":
        slope: Tensor = torch.ops.aten.gelu_backward(g, u)
        return slope
    return g
