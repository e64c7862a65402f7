"""Alpha schedules over all seeds at once, and their scalar face.

Formulas of linear and drift-controlled grafting: Phase 2 plan, section 5.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple

import torch
from torch import Tensor

from esper_ray.errors import ConfigError

_LONGEST_PAUSE: Final = 2**15 - 1  # the pause column is int16


@dataclass(frozen=True, slots=True)
class GraftingSettings:
    """`ramp_epochs` from alpha 0 to 1; drift is relative weight change per optimiser step."""

    ramp_epochs: int = 50
    drift_threshold: float = 0.01
    pause_epochs: int = 10

    def __post_init__(self) -> None:
        if self.ramp_epochs < 1:
            raise ConfigError(f"ramp_epochs must be at least 1, got {self.ramp_epochs}")
        if not 0 <= self.pause_epochs <= _LONGEST_PAUSE:
            raise ConfigError(
                f"pause_epochs must be in 0..{_LONGEST_PAUSE}, got {self.pause_epochs}"
            )
        if not self.drift_threshold >= 0:
            raise ConfigError(f"drift_threshold must not be negative, got {self.drift_threshold}")


class GraftingColumns(NamedTuple):
    """What a strategy keeps per seed; (seeds,) each. `pauses` counts how often one began."""

    alpha: Tensor
    pause: Tensor
    pauses: Tensor


class GraftingStrategyBase(ABC):
    """One alpha schedule; subclasses give the batched rule, the scalar face follows from it."""

    strategy_id: ClassVar[int]
    name: ClassVar[str]

    def __init__(self, settings: GraftingSettings | None = None) -> None:
        self.settings = settings or GraftingSettings()
        self._scalar: GraftingColumns | None = None

    @abstractmethod
    def advance(
        self, epochs: Tensor, ramp: int, drift: Tensor, columns: GraftingColumns
    ) -> GraftingColumns:
        """Columns after one epoch; `epochs` (seeds,) int counts epochs in GRAFTING from 1."""

    def compute_alpha(
        self, current_epoch: int, total_epochs: int, metrics: Mapping[str, float]
    ) -> float:
        """Alpha of a single seed at `current_epoch`; ValueError unless total_epochs is positive."""
        if total_epochs < 1:
            raise ValueError(f"total_epochs must be at least 1, got {total_epochs}")
        held = torch.tensor([metrics.get("current_alpha", 0.0)], dtype=torch.float64)
        none = torch.zeros(1, dtype=torch.int16)
        before = self._scalar or GraftingColumns(held, none, none)
        self._scalar = self.advance(
            torch.tensor([current_epoch]),
            total_epochs,
            torch.tensor([metrics.get("weight_drift", 0.0)], dtype=torch.float64),
            before._replace(alpha=held),
        )
        return float(self._scalar.alpha)


def _ramp(epochs: Tensor, ramp: int, alpha: Tensor) -> Tensor:
    return (epochs.to(alpha.dtype) / ramp).clamp(0.0, 1.0)


class LinearGrafting(GraftingStrategyBase):
    """min(1, t / T)."""

    strategy_id = 0
    name = "linear"

    def advance(
        self, epochs: Tensor, ramp: int, drift: Tensor, columns: GraftingColumns
    ) -> GraftingColumns:
        """The straight ramp; drift plays no part."""
        del drift
        return columns._replace(alpha=_ramp(epochs, ramp, columns.alpha))


class DriftControlledGrafting(GraftingStrategyBase):
    """Holds alpha while the weights drift, then jumps to where the linear ramp would be."""

    strategy_id = 1
    name = "drift_controlled"

    def advance(
        self, epochs: Tensor, ramp: int, drift: Tensor, columns: GraftingColumns
    ) -> GraftingColumns:
        """Arm the pause where drift exceeds the threshold; a drift that is not finite holds too."""
        alpha, pause, pauses = columns
        drifting = drift > self.settings.drift_threshold
        armed = torch.where(drifting, self.settings.pause_epochs, pause)
        begins = (armed > 0) & (pause == 0)
        holds = (armed > 0) | ~drift.isfinite()
        return GraftingColumns(
            torch.where(holds, alpha, _ramp(epochs, ramp, alpha)),
            (armed - 1).clamp(min=0).to(pause.dtype),
            pauses + begins.to(pauses.dtype),
        )


STRATEGIES: Final[tuple[type[GraftingStrategyBase], ...]] = (
    LinearGrafting,
    DriftControlledGrafting,
)


def strategy_id(name: str) -> int:
    """Number of the strategy of that name; ConfigError lists the known ones."""
    for kind in STRATEGIES:
        if kind.name == name:
            return kind.strategy_id
    known = ", ".join(kind.name for kind in STRATEGIES)
    raise ConfigError(f"no grafting strategy is named {name!r}", f"choose one of: {known}")


def advance_alpha(
    strategy: Tensor,
    epochs: Tensor,
    drift: Tensor,
    columns: GraftingColumns,
    settings: GraftingSettings,
) -> GraftingColumns:
    """One epoch of every strategy over all rows, each row taking its own strategy's columns."""
    result = columns
    for kind in STRATEGIES:
        mine = strategy == kind.strategy_id
        new = kind(settings).advance(epochs, settings.ramp_epochs, drift, columns)
        result = GraftingColumns(
            *(torch.where(mine, a, b) for a, b in zip(new, result, strict=True))
        )
    return result
