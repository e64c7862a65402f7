"""Two small MLPs, each in two stages: one over bytes, one over the digits."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from torch import Tensor, nn

from esper_ray.models.stages import StageFactory


class ByteReader(nn.Module):
    """Embeds a window of bytes (samples, window) and mixes it: (samples, hidden)."""

    def __init__(self, window: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, embedding)
        self.hidden = nn.Sequential(nn.Linear(window * embedding, hidden), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Int64 byte values to hidden activations."""
        out: Tensor = self.hidden(self.embedding(x).flatten(1))
        return out


class Predictor(nn.Module):
    """One more hidden layer and the logits: (samples, inputs) -> (samples, classes)."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU())
        self.logits = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden activations to logits."""
        out: Tensor = self.logits(self.hidden(x))
        return out


def byte_mlp(window: int = 8, embedding: int = 12, hidden: int = 64) -> list[StageFactory]:
    """Byte-level language model that predicts the byte after a window, in two stages."""
    return [
        StageFactory("reader", partial(ByteReader, window, embedding, hidden)),
        StageFactory("predictor", partial(Predictor, hidden, hidden, 256)),
    ]


def _hidden_layer(inputs: int, hidden: int) -> nn.Module:
    layer = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU())
    return nn.Sequential(OrderedDict(hidden=layer))


def digits_mlp(hidden: int = 32) -> list[StageFactory]:
    """Classifier of the 8 x 8 digits, in two stages."""
    return [
        StageFactory("reader", partial(_hidden_layer, 64, hidden)),
        StageFactory("predictor", partial(Predictor, hidden, hidden, 10)),
    ]
