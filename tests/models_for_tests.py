"""Models that tests name by import string."""

from __future__ import annotations

from torch import Tensor, nn

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
