"""A model and a strategy of its own; to import the module registers the strategy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from esper_ray.grafting import GraftingRows, GraftingStrategyBase, register_strategy
from esper_ray.models import StageFactory, byte_mlp


@register_strategy
class Square(GraftingStrategyBase):
    """Slow at first; an id that no other strategy has."""

    strategy_id = 101
    name = "square_for_tests"

    def propose(self, epoch: int, total: int, metrics: Mapping[str, float]) -> float:
        """One seed."""
        del metrics
        return (epoch / total) ** 2

    def advance(self, rows: GraftingRows) -> NDArray[np.float64]:
        """All rows."""
        alpha: NDArray[np.float64] = (rows.epochs / rows.ramp) ** 2
        return alpha


def two_stages(embedding: int, hidden: int) -> list[StageFactory]:
    """The byte model."""
    return byte_mlp(embedding=embedding, hidden=hidden)
