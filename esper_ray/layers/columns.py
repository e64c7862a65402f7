"""The border of a layer that is split over shards: what goes to all of them, what comes together.

Inputs and outputs are the same on every shard, so only two things travel: the shards' parts of
the output, and their parts of the gradient of the input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Shards(Protocol):
    """The shards of a stage, as one of them sees them; all call the same things in one order."""

    index: int

    def gather(self, name: str, own: Tensor) -> list[Tensor]:
        """Everybody's tensor of that name, in the order of the shards."""
        ...


@dataclass(frozen=True, slots=True)
class Border:
    """One layer's border; `first` is the shard's first feature, `dim` where features lie."""

    layer_id: str
    shards: Shards
    first: int
    dim: int


def split_border(module: nn.Module, border: Border) -> None:
    """Have a host of some features take whole inputs and put out whole outputs.

    It carries its seeds already: they see its own features only.
    """
    module.register_forward_pre_hook(_Enter(border), with_kwargs=True)
    module.register_forward_hook(_Leave(border))


@dataclass(frozen=True, slots=True)
class _Enter:
    border: Border

    def __call__(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Any]:
        x, *rest = args
        return (_Spread.apply(x, self.border), *rest), kwargs  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class _Leave:
    border: Border

    def __call__(self, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Any:
        return _Gather.apply(output, self.border)  # type: ignore[no-untyped-call]


class _Spread(torch.autograd.Function):
    """x for every shard; its gradient is the sum of theirs, in float32 at least."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, border: Border) -> Tensor:
        ctx.border = border
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        border: Border = ctx.border
        parts = border.shards.gather(f"input of {border.layer_id}", g)
        return added(parts), None


class _Gather(torch.autograd.Function):
    """All features, in the order of the shards; each gets the gradient of its own."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, border: Border) -> Tensor:
        ctx.border, ctx.width = border, y.shape[border.dim]
        return torch.cat(border.shards.gather(f"output of {border.layer_id}", y), border.dim)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g.narrow(ctx.border.dim, ctx.border.first, ctx.width), None


def added(parts: list[Tensor]) -> Tensor:
    """The sum in the order of the list, the same on every shard, in the dtype of the parts."""
    kind = parts[0].dtype
    wide = torch.promote_types(kind, torch.float32)
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part
    return total.to(kind)
