"""Whether anyone but autograd holds a gradient: one that nobody else holds may be written over.

A residual branch, a hook or the caller of `backward` shows in the counts of references, which are
compared with those of a gradient that is known to be held by nobody else. Where torch does not
tell them, every gradient counts as shared and is copied.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Holders = tuple[int, int, int]


def holders(g: Tensor) -> Holders | None:
    """References to the storage, to the tensor and to its Python object; None if not told."""
    storage_count = getattr(torch._C, "_storage_Use_Count", None)
    tensor_count = getattr(g, "_use_count", None)
    if storage_count is None or tensor_count is None:
        return None
    return storage_count(g.untyped_storage()._cdata), tensor_count(), sys.getrefcount(g)


def unshared(found: Holders | None) -> bool:
    """Whether these are the holders of a gradient that only its backward holds."""
    alone = _alone()
    return found is not None and alone is not None and all(map(int.__le__, found, alone))


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[Holders | None]) -> Tensor:
        ctx.seen = seen
        return x.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        ctx.seen.append(holders(g))
        return g, None


def watch(x: Tensor, seen: list[Holders | None]) -> Tensor:
    """x, whose gradient's holders are put into `seen` when it is known."""
    y: Tensor = _Watch.apply(x, seen)  # type: ignore[no-untyped-call]
    return y


@functools.cache
def _alone() -> Holders | None:
    seen: list[Holders | None] = []
    with torch.enable_grad():
        x = torch.ones(2, requires_grad=True)
        (watch(x * 1, seen) * 2).sum().backward()  # type: ignore[no-untyped-call]
    return seen[0]
