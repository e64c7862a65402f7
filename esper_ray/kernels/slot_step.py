"""Adam's step of some slots of a bank in two launches, errors counted along the way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from esper_ray.kernels.form import power
from esper_ray.kernels.triton_step import adam_kernel, squares_kernel

_BLOCK: Final = 1024
_MOST_SPLITS: Final = 64


@dataclass(frozen=True, slots=True)
class BankRows:
    """What a step reads and writes: float32 weights (slots, ...) with their two moments.

    `counts` int32, `seeds` int64, those of free slots -1, and `moves` bool are (slots,), `faults`
    float32 and `errors` int32 (seeds,). `listed` (rows,) are the slots to look at: those that
    `moves` names, and those whose seeds may have failed.
    """

    weights: tuple[Tensor, ...]
    means: tuple[Tensor, ...]
    squares: tuple[Tensor, ...]
    counts: Tensor
    seeds: Tensor
    faults: Tensor
    errors: Tensor
    listed: Tensor
    moves: Tensor


class SlotStep:
    """Steps the rows that it was told of last, at addresses that stay while the bank's do.

    Nothing here waits for the device. A CUDA graph that holds a step follows a new list of no
    more rows; a longer one asks for a new graph.
    """

    def __init__(
        self,
        *,
        lr: float,
        warmup_steps: int,
        clip_norm: float,
        beta1: float,
        beta2: float,
        eps: float,
    ) -> None:
        self._settings = {
            "LR": float(lr),
            "WARMUP": float(max(warmup_steps, 1)),
            "CLIP": float(clip_norm),
            "BETA1": float(beta1),
            "BETA2": float(beta2),
            "LOG1": math.log2(beta1) if beta1 else -math.inf,
            "LOG2": math.log2(beta2) if beta2 else -math.inf,
            "EPS": float(eps),
        }
        self._listed = self._moves = self.norms = torch.empty(0)

    norms: Tensor
    """(slots,) gradient norms of the listed slots at the last step, NaN before."""

    def tell(self, bank: BankRows) -> None:
        """Step these rows from now on."""
        self._bank, self._rows = bank, len(bank.listed)
        sizes = tuple(weight[0].numel() for weight in bank.weights)
        block = min(_BLOCK, max(32, power(max(sizes))))
        splits = min(_MOST_SPLITS, -(-max(sizes) // block))
        self._cut: dict[str, Any] = {
            "WEIGHTS": len(sizes),
            "SIZES": sizes,
            "SPLITS": splits,
            "BLOCK": block,
        }
        if len(self._listed) != len(bank.counts) or self._listed.device != bank.counts.device:
            slots = len(bank.counts)
            self._listed = bank.counts.new_empty(slots)
            self._moves = torch.empty_like(bank.moves)
            self._old = bank.counts.new_empty(slots)
            self.norms = bank.faults.new_empty(slots)
            self._parts = bank.faults.new_empty(slots, splits)
        self._listed.fill_(-1)[: self._rows] = bank.listed
        self._moves.copy_(bank.moves)
        self.norms.fill_(math.nan)

    def gradients(self) -> tuple[Tensor, ...] | None:
        """The weights' gradients; None where one is missing or not laid out as its weight."""
        found = tuple(w.grad for w in self._bank.weights if w.grad is not None)
        plain = all(g.dtype == torch.float32 and g.is_contiguous() for g in found)
        return found if plain and len(found) == len(self._bank.weights) else None

    def take(self, gradients: tuple[Tensor, ...]) -> None:
        """One step with these gradients."""
        bank, grid = self._bank, (self._rows, self._cut["SPLITS"])
        squares_kernel[grid](
            gradients, self._listed, bank.counts, self._parts, self._old, num_warps=4, **self._cut
        )
        adam_kernel[grid](
            bank.weights, gradients, bank.means, bank.squares, self._listed, self._moves,
            bank.seeds, bank.counts, self._parts, self._old, self.norms, bank.faults, bank.errors,
            PADDED=power(grid[1]), num_warps=4, **self._cut, **self._settings,
        )  # fmt: skip
