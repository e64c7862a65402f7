"""What a grafting strategy is: a scalar rule to read, and the same rule over all its rows."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from esper_ray.events import GraftingSignals
from esper_ray.grafting.settings import GraftingSettings

Floats = NDArray[np.float64]


@dataclass(slots=True)
class GraftingRows:
    """The rows of one strategy in one epoch; every array is (rows,).

    `columns` holds the memory columns that the strategy declares; what it puts there is kept.
    """

    epochs: NDArray[np.int32]
    alpha: Floats
    ramp: int
    columns: dict[str, NDArray[Any]]
    signals: GraftingSignals
    """Of every seed in GRAFTING: `signal` gives those of these rows."""
    index: NDArray[np.intp] | slice = field(default_factory=lambda: slice(None))
    """Where these rows are among all."""

    def signal(self, name: str) -> Floats:
        """One measure of GraftingSignals for these rows; NaN = not measured."""
        # Gathered when asked for: taking all measures for every strategy cost a fifth of the epoch.
        measure: Floats = getattr(self.signals, name)
        return measure[self.index]


class GraftingStrategyBase(ABC):
    """One alpha schedule. A result that is not finite holds alpha; [0, 1] bounds every result."""

    strategy_id: ClassVar[int]
    name: ClassVar[str]
    memory: ClassVar[tuple[str, ...]] = ()
    """Columns of GraftingMemory that `advance` reads and writes."""
    reads: ClassVar[tuple[str, ...]] = ()
    """Signals that it reads; a gain is measured only for seeds whose strategy reads it."""

    def __init__(self, settings: GraftingSettings | None = None) -> None:
        self.settings = settings or GraftingSettings()

    def compute_alpha(
        self, current_epoch: int, total_epochs: int, metrics: Mapping[str, float]
    ) -> float:
        """Alpha of one seed at `current_epoch`, this object remembering that seed's past.

        ValueError unless `total_epochs` is positive.
        """
        if total_epochs < 1:
            raise ValueError(f"total_epochs must be at least 1, got {total_epochs}")
        alpha = self.propose(current_epoch, total_epochs, metrics)
        held = metrics.get("current_alpha", 0.0)
        return min(1.0, max(0.0, alpha if math.isfinite(alpha) else held))

    @abstractmethod
    def propose(self, epoch: int, total: int, metrics: Mapping[str, float]) -> float:
        """The rule for one seed in plain numbers, before the bounds; NaN holds alpha."""

    @abstractmethod
    def advance(self, rows: GraftingRows) -> Floats:
        """The same rule for all rows at once: (rows,), before the bounds; NaN holds alpha."""


def limit_step(alpha: Floats, held: Floats, ramp: int) -> Floats:
    """Alpha that does not fall below `held` and rises by 2 / ramp at most; NaN stays NaN."""
    return np.minimum(np.maximum(alpha, held), held + 2 / ramp)
