"""Models that tests name by import string."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

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


class Sleeper(nn.Module):
    """Passes everything on; sleeps for an hour where `mark` is a file, which it removes first."""

    def __init__(self, mark: str) -> None:
        super().__init__()
        self.mark = Path(mark)

    def forward(self, x: Tensor) -> Tensor:
        if self.mark.exists():
            self.mark.unlink()
            time.sleep(3600)
        return x


def sleeping(mark: str) -> list[StageFactory]:
    """The byte model, whose second stage hangs once after `mark` has come to be."""
    reader, predictor = byte_mlp(window=4, embedding=3, hidden=16)
    build = partial(_after_sleeper, mark, predictor)
    return [reader, StageFactory("predictor", build)]


def _after_sleeper(mark: str, stage: StageFactory) -> nn.Module:
    return nn.Sequential(Sleeper(mark), stage.build())
