"""One tick of a layer's seeds on the device that holds them, at fixed addresses."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from esper_ray.kernels.triton_judge import REFUSALS, STATES
from esper_ray.kernels.triton_tick import tick_kernel
from esper_ray.lifecycle import MOVES

STRATEGIES: Final = ("linear", "drift_controlled", "momentum", "adaptive", "stability")
"""Strategies that the kernel knows; the place is the number."""
FLOATS: Final = (
    "velocity",
    "last",
    "performance_delta",
    "loss_variance",
    "accuracy_variance",
)
SHORTS: Final = ("pause", "paused", "ramp", "since_switch")
BYTES: Final = ("bad", "improving", "limited")
"""Rows of `Tick.floats`, `Tick.shorts` and `Tick.bytes`: what grafting remembers of a seed."""
SIGNALS: Final = (
    "weight_drift",
    "performance_delta",
    "loss_variance",
    "gradient_norm",
    "accuracy_variance",
)
ASKED: Final = (
    "target",
    "expected_state",
    "expected_generation",
    "cause",
    "blueprint_id",
    "strategy",
    "checkpoint_id",
)
_BLOCK: Final = 64


class Rules(NamedTuple):
    """How alphas move; `switch` and the last three are those of the mode performance."""

    ramp_epochs: int
    drift_threshold: float
    pause_epochs: int
    goes_on: bool
    """Whether epochs spent in a pause do not count: `resume: continue`."""
    momentum_factor: float
    adaptive_drift: float
    adaptive_delta: float
    check_every: int
    loss_variance_max: float
    gradient_norm_max: float
    accuracy_variance_max: float
    switch: bool
    improving_delta: float
    improving_epochs: int
    cooldown_epochs: int


class Columns(NamedTuple):
    """The buffers of a layer's seeds, named and shaped as in `seeds.SeedColumns`."""

    columns: Tensor
    history: Tensor
    transition_count: Tensor
    metrics: Tensor
    metrics_valid: Tensor
    alpha: Tensor
    generation: Tensor


_DTYPES: Final = {
    "columns": torch.int32,
    "history": torch.int32,
    "transition_count": torch.int16,
    "metrics": torch.float32,
    "metrics_valid": torch.uint8,
    "alpha": torch.float32,
    "generation": torch.int16,
}


class Tick:
    """Moves and epochs of all seeds of a layer, one launch each or one for both.

    Fill `asked` (7, seeds) int32, whose row `target` is -1 where no move is asked for, `epoch` (1,)
    int32 and `signals` (5, seeds) float64, NaN = not measured; a launch reads them when it runs
    and takes the moves out of `asked`. It leaves a Refusal code per seed in `reason` (seeds,)
    uint8, 0 where nothing was asked. No launch waits for the device and no address changes, so a
    CUDA graph may hold it. Whoever renews a seed or gives it weights does so as after any move.
    """

    def __init__(self, state: Columns, rules: Rules) -> None:
        for name, buffer in zip(state._fields, state, strict=True):
            dtype = _DTYPES[name]
            if buffer.dtype != dtype or not buffer.is_contiguous():
                raise ValueError(f"{name} must be contiguous {dtype}, got {buffer.dtype}")
        seeds, device = len(state.alpha), state.alpha.device
        self.floats = torch.zeros(len(FLOATS), seeds, dtype=torch.float64, device=device)
        self.shorts = torch.zeros(len(SHORTS), seeds, dtype=torch.int16, device=device)
        self.bytes = torch.zeros(len(BYTES), seeds, dtype=torch.uint8, device=device)
        self.asked = torch.full((len(ASKED), seeds), -1, dtype=torch.int32, device=device)
        self.signals = torch.full(
            (len(SIGNALS), seeds), torch.nan, dtype=torch.float64, device=device
        )
        self.reason = torch.zeros(seeds, dtype=torch.uint8, device=device)
        self.epoch = torch.zeros(1, dtype=torch.int32, device=device)
        self._moves = torch.from_numpy(MOVES.reshape(-1).copy()).to(device)
        # Made once: what a launch costs is mostly the time that Python takes to begin it.
        self._grid = (-(-seeds // _BLOCK),)
        self._arguments = (
            *state, self.floats, self.shorts, self.bytes, self.asked, self.signals, self.reason,
            self._moves, self.epoch, seeds, (*rules, 2 / rules.ramp_epochs),
            STATES, REFUSALS,
        )  # fmt: skip

    def __call__(self, *, moves: bool = True, epoch: bool = True) -> None:
        """Make the moves asked for, then let an epoch pass; or one of the two."""
        tick_kernel[self._grid](
            *self._arguments, moves, epoch, _BLOCK, num_warps=_BLOCK // 32, enable_fp_fusion=False
        )
