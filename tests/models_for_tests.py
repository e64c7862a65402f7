"""Models that tests name by import string."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

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


class Reader(nn.Module):
    """Bytes (samples, window) as numbers in [-1, 1]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.embedding(x).mean(1)
        return out


def _piece(width: int, *, first: bool, last: bool) -> nn.Module:
    module = nn.Sequential()
    if first:
        module.add_module("reader", Reader(width))
    module.add_module("wide", nn.Sequential(nn.Linear(width, width + 3), nn.Tanh()))
    module.add_module("narrow", nn.Linear(width + 3, width))
    if last:
        module.add_module("logits", nn.Linear(width, 256))
    return module


def pieces(stages: int, width: int) -> list[StageFactory]:
    """A byte model of so many stages, each of two layers that can be split."""
    return [
        StageFactory(
            f"s{index}", partial(_piece, width, first=index == 0, last=index == stages - 1)
        )
        for index in range(stages)
    ]


def grouped() -> list[StageFactory]:
    """A layer that cannot be split, beside one that can."""
    module = OrderedDict(embedding=Reader(8), norm=nn.LayerNorm(8), out=nn.Linear(8, 256))
    return [StageFactory("only", lambda: nn.Sequential(module))]
