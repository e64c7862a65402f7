"""A small convolutional classifier of images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn

from esper_ray.models.stages import StageFactory

Norm = Literal["group", "batch"]


def _norm(kind: Norm, channels: int) -> nn.Module:
    if kind == "group":
        return nn.GroupNorm(math.gcd(8, channels), channels)
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    raise ValueError(f"norm must be 'group' or 'batch', got {kind!r}")


def _block(inputs: int, outputs: int, stride: int, norm: Norm) -> nn.Module:
    """(samples, inputs, H, W) -> (samples, outputs, H / stride, W / stride), rounded up."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, _norm(norm, outputs), nn.ReLU())


def _blocks(planes: Sequence[int], norm: Norm, first_stride: int) -> nn.Sequential:
    """A block from each number of planes to the next; all but the first halve the image."""
    strides = itertools.chain([first_stride], itertools.repeat(2))
    steps = zip(itertools.pairwise(planes), strides, strict=False)
    return nn.Sequential(*(_block(*pair, stride, norm) for pair, stride in steps))


class GlobalMean(nn.Module):
    """Mean over the image: (samples, channels, H, W) -> (samples, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps to features."""
        return x.mean((2, 3))


class SmallConvNet(nn.Module):
    """Images (samples, inputs, H, W) to logits (samples, classes), for any H and W.

    One 3 x 3 block for each of `channels`, the second and later ones at half the size of the one
    before; then the mean over the image and a linear head.
    """

    def __init__(
        self,
        channels: Sequence[int] = (16, 32),
        classes: int = 10,
        inputs: int = 1,
        norm: Norm = "group",
    ) -> None:
        super().__init__()
        _check(channels)
        self.blocks = _blocks((inputs, *channels), norm, first_stride=1)
        self.pool = GlobalMean()
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        out: Tensor = self.head(self.pool(self.blocks(x)))
        return out


class ConvReader(nn.Module):
    """First stage: images, or rows of their pixels, to feature maps."""

    def __init__(self, image: Sequence[int], channels: Sequence[int], norm: Norm) -> None:
        super().__init__()
        self.image = tuple(image)
        self.blocks = _blocks((self.image[0], *channels), norm, first_stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """(samples, pixels) or (samples, colours, H, W) to (samples, channels, H', W')."""
        out: Tensor = self.blocks(x.reshape(-1, *self.image))
        return out


class ConvPredictor(nn.Module):
    """Last stage: feature maps of `channels[0]` planes to logits (samples, classes)."""

    def __init__(self, channels: Sequence[int], classes: int, norm: Norm) -> None:
        super().__init__()
        self.blocks = _blocks(channels, norm, first_stride=2)
        self.pool = GlobalMean()
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps to logits."""
        out: Tensor = self.head(self.pool(self.blocks(x)))
        return out


def small_convnet(
    channels: Sequence[int] = (16, 32),
    classes: int = 10,
    image: Sequence[int] = (1, 8, 8),
    norm: Norm = "group",
) -> list[StageFactory]:
    """SmallConvNet in two stages, for images of `image` (colours, H, W) or rows of their pixels.

    Seeds divide the last dimension of what they target: that of `predictor.pool` and
    `predictor.head` is features, that of a block is columns of the image. Group norms do not
    depend on how a batch is cut into micro-batches; batch norms do.
    """
    _check(channels)
    if len(image) != 3:
        raise ValueError(f"image must be colours, height and width, got {list(image)}")
    first = (len(channels) + 1) // 2
    return [
        StageFactory("reader", partial(ConvReader, image, channels[:first], norm)),
        StageFactory("predictor", partial(ConvPredictor, channels[first - 1 :], classes, norm)),
    ]


def _check(channels: Sequence[int]) -> None:
    if not channels or min(channels) < 1:
        raise ValueError(f"channels must be numbers of at least 1, got {list(channels)}")
