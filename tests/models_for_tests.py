"""Models that tests name by import string."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from esper_ray.grafting import GraftingRows, GraftingStrategyBase, register_strategy
from esper_ray.models import StageFactory, byte_mlp


def one_stage(hidden: int) -> list[StageFactory]:
    """The byte model's two stages as one module."""
    stages = byte_mlp(window=4, embedding=3, hidden=hidden)
    return [StageFactory("model", lambda: nn.Sequential(*(stage.build() for stage in stages)))]


class Twice(nn.Module):
    """Runs the same linear layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.shared(self.shared(x))
        return out


def twice() -> list[StageFactory]:
    """One stage with a layer that runs twice."""
    return [StageFactory("model", Twice)]


def no_stages() -> list[StageFactory]:
    """An empty model."""
    return []


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


def two_stages_and_a_strategy(embedding: int, hidden: int) -> list[StageFactory]:
    """The byte model, from a module that registers a strategy."""
    return byte_mlp(embedding=embedding, hidden=hidden)
