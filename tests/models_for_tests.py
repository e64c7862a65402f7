"""Models that tests name by import string."""

from __future__ import annotations

import time
from collections import OrderedDict
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
