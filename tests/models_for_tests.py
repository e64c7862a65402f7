"""Models that tests name by import string."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from esper_ray.models import StageFactory, byte_mlp
from esper_ray.models.mlp import ByteReader


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


class ChokingReader(ByteReader):
    """Puts out NaN in training for a micro-batch whose bytes add up to one of `sums`."""

    def __init__(self, embedding: int, hidden: int, sums: list[int]) -> None:
        super().__init__(8, embedding, hidden)
        self.sums = sums

    def forward(self, x: Tensor) -> Tensor:
        bad = (x.sum() == torch.tensor([*self.sums, -1], device=x.device)).any() & self.training
        read = self.embedding(x).flatten(1)
        out: Tensor = self.hidden(torch.where(bad, torch.nan, read))
        return out


def choking(embedding: int, hidden: int, sums: list[int]) -> list[StageFactory]:
    """The byte model whose first stage chokes on some batches."""
    _, predictor = byte_mlp(embedding=embedding, hidden=hidden)
    return [
        StageFactory("reader", lambda: ChokingReader(embedding, hidden, sums)),
        predictor,
    ]


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
