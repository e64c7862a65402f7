"""One epoch of alpha over all seeds in GRAFTING, each by its own strategy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from esper_ray.events import GraftingSignals
from esper_ray.grafting.base import Floats, GraftingRows, GraftingStrategyBase, limit_step
from esper_ray.grafting.memory import GraftingMemory
from esper_ray.grafting.registry import STRATEGIES
from esper_ray.grafting.settings import GraftingSettings

_Index = NDArray[np.intp] | slice


def advance_alpha(
    memory: GraftingMemory,
    strategy: NDArray[np.int32],
    epochs: NDArray[np.int32],
    alpha: NDArray[np.float32],
    signals: GraftingSignals,
    settings: GraftingSettings,
) -> NDArray[np.float32]:
    """Alpha after one epoch; `memory` moves on too. Arrays are aligned with `memory.seed_ids`.

    A row of an unregistered strategy, or whose result is not finite, holds its alpha.
    """
    memory.require_rows(signals.seed_ids)
    held = alpha.astype(np.float64)
    proposed = np.full_like(held, np.nan)
    # A strategy may overflow: its infinity is caught below like any other.
    with np.errstate(over="ignore", invalid="ignore"):
        for kind, index in _groups(strategy):
            rows = GraftingRows(
                epochs[index],
                held[index],
                settings.ramp_epochs,
                {name: memory[name][index] for name in kind.memory},
                signals,
                index,
            )
            proposed[index] = kind(settings).advance(rows)
            for name, values in rows.columns.items():
                memory[name][index] = values
    return _bounded(proposed, held, memory["limited"], settings.ramp_epochs)


def _groups(strategy: NDArray[np.int32]) -> Iterator[tuple[type[GraftingStrategyBase], _Index]]:
    for number, kind in STRATEGIES.items():
        index = np.flatnonzero(strategy == number)
        if 0 < index.size < strategy.size:
            yield kind, index
        elif index.size:
            yield kind, slice(None)  # views instead of copies: one strategy is the usual case


def _bounded(
    proposed: Floats, held: Floats, limited: NDArray[np.bool_], ramp: int
) -> NDArray[np.float32]:
    alpha = np.where(np.isfinite(proposed), proposed, held)
    if limited.any():
        alpha = np.where(limited, limit_step(alpha, held, ramp), alpha)
    return np.clip(alpha, 0.0, 1.0).astype(np.float32)
