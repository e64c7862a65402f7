"""Adam over a bank of seeds: each row has its own step count, warm-up and clipping.

Adam: Kingma and Ba, ICLR 2015, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esper_ray.seeds import SeedBank


@dataclass(frozen=True, slots=True)
class SlotAdamSettings:
    """Learning rate, steps of linear warm-up after birth, largest gradient norm of one seed."""

    lr: float = 2e-3
    warmup_steps: int = 10
    clip_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (like.ndim - 1))


@torch.no_grad()
def gradient_norms(bank: SeedBank, slots: Tensor | None = None) -> Tensor:
    """(slots,) Euclidean norm of each seed's gradient over all of its weights.

    With `slots` only those are computed, the others are 0.
    """
    squares = [
        _picked(w.grad, slots).flatten(1).pow(2).sum(1)
        for w in bank.weights.values()
        if w.grad is not None
    ]
    if not squares:
        return torch.zeros(bank.num_slots, device=bank.step_count.device)
    norms = torch.stack(squares).sum(0).sqrt()
    return norms if slots is None else norms.new_zeros(bank.num_slots).index_copy(0, slots, norms)


@torch.no_grad()
def step_rows(
    bank: SeedBank,
    mask: Tensor,
    norms: Tensor,
    settings: SlotAdamSettings,
    slots: Tensor | None = None,
) -> None:
    """One Adam step of the rows where `mask` (slots,) is True; other rows keep every bit.

    `norms` (slots,) are the gradient norms. A row whose norm is not finite is left out, and so is
    one without a gradient: stale momentum must not move it. `slots`, where given, holds every row
    of `mask`: nothing else is read.
    """
    moved = mask & norms.isfinite() & (norms > 0)
    bank.step_count += moved.to(bank.step_count.dtype)
    count = bank.step_count.clamp(min=1).to(norms.dtype)
    rate = settings.lr * (count / max(settings.warmup_steps, 1)).clamp(max=1.0)
    scale = (settings.clip_norm / norms.clamp(min=1e-12)).clamp(max=1.0).nan_to_num()
    first, second = 1 - settings.beta1**count, 1 - settings.beta2**count
    for name, weight in bank.weights.items():
        if weight.grad is None:
            continue
        here, clip, pace, spread = (
            _per_row(_picked(v, slots), weight) for v in (moved, scale, rate / first, second)
        )
        gradient = _picked(weight.grad, slots).nan_to_num() * clip
        stored = (*bank.moments(name), weight)
        mean, square, old = (_picked(value, slots) for value in stored)
        mean = torch.where(here, torch.lerp(gradient, mean, settings.beta1), mean)
        fresh = settings.beta2 * square + (1 - settings.beta2) * gradient * gradient
        square = torch.where(here, fresh, square)
        denominator = (square / spread).sqrt() + settings.eps
        now = torch.where(here, old - pace * mean / denominator, old)
        for value, new in zip(stored, (mean, square, now), strict=True):
            if slots is None:
                value.copy_(new)
            else:
                value.index_copy_(0, slots, new)


def _picked(values: Tensor, slots: Tensor | None) -> Tensor:
    return values if slots is None else values.index_select(0, slots)
