"""A byte-level GPT: pre-norm blocks, learned positions, MLPs that can carry seeds."""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from esper_ray.keyed_random import stream_key
from esper_ray.models.gpt_size import SMALL, GPTSize
from esper_ray.models.stages import StageFactory

BYTES: Final = 256
_STD: Final = 0.02


class ByteEmbedding(nn.Module):
    """Bytes and their positions: (samples, length) int64 -> (samples, length, width)."""

    def __init__(self, size: GPTSize) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES, size.width)
        self.positions = nn.Parameter(torch.empty(size.context, size.width))

    def forward(self, x: Tensor) -> Tensor:
        """Int64 byte values, at most `context` of them, to the residual stream."""
        length, context = x.shape[1], len(self.positions)
        if length > context:
            raise ValueError(f"{length} bytes do not fit a context of {context}")
        out: Tensor = self.bytes(x) + self.positions[:length]
        return out


class CausalAttention(nn.Module):
    """Each position reads itself and earlier ones: (samples, length, width), same shape out."""

    def __init__(self, size: GPTSize) -> None:
        super().__init__()
        self.heads = size.heads
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised residual stream to what is added to it."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (samples, length, 3, heads, head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (samples, heads, length, head) each
        read = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(read.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention, then `mlp`, each added to the residual stream (samples, length, width).

    `mlp` reads the normalised stream and gives what is added, so seeds can target it as a whole.
    """

    def __init__(self, size: GPTSize) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(size.width)
        self.attention = CausalAttention(size)
        self.mlp_norm = nn.LayerNorm(size.width)
        self.mlp = nn.Sequential(
            OrderedDict(
                up=nn.Linear(size.width, size.mlp_units),
                active=nn.GELU(),
                down=nn.Linear(size.mlp_units, size.width),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Residual stream in and out."""
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class ByteGPT(nn.Module):
    """Logits of the byte after each position: (samples, length) int64 -> (samples, length, 256).

    The output head is the byte embedding. Without `every_position` only the byte after the last
    position is predicted: (samples, 256).
    """

    def __init__(self, size: GPTSize = SMALL, every_position: bool = True) -> None:
        super().__init__()
        key = _draw_key()
        self.every_position = every_position
        self.embedding = ByteEmbedding(size)
        self.blocks = _blocks(size, size.layers)
        self.norm = nn.LayerNorm(size.width)
        _initialise(self, size, key)

    def forward(self, x: Tensor) -> Tensor:
        """Int64 byte values to logits."""
        x = self.blocks(self.embedding(x))
        x = self.norm(x if self.every_position else x[:, -1])
        # The product, not a module that shares the weight: copies and to_empty keep it one tensor.
        return functional.linear(x, self.embedding.bytes.weight)


class GPTReader(nn.Module):
    """First stage, the embedding and `layers` blocks: (samples, length) -> (..., width)."""

    def __init__(self, size: GPTSize, layers: int) -> None:
        super().__init__()
        key = _draw_key()
        self.embedding = ByteEmbedding(size)
        self.blocks = _blocks(size, layers)
        _initialise(self, size, key)

    def forward(self, x: Tensor) -> Tensor:
        """Int64 byte values to the residual stream."""
        out: Tensor = self.blocks(self.embedding(x))
        return out


class GPTPredictor(nn.Module):
    """Last stage, `layers` blocks and a head of its own: (samples, length, width) -> logits."""

    def __init__(self, size: GPTSize, layers: int, every_position: bool) -> None:
        super().__init__()
        key = _draw_key()
        self.every_position = every_position
        self.blocks = _blocks(size, layers)
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, BYTES, bias=False)
        _initialise(self, size, key)

    def forward(self, x: Tensor) -> Tensor:
        """Residual stream to logits, (samples, length, 256) or (samples, 256)."""
        x = self.blocks(x)
        out: Tensor = self.head(self.norm(x if self.every_position else x[:, -1]))
        return out


def byte_gpt(
    layers: int = SMALL.layers,
    width: int = SMALL.width,
    heads: int = SMALL.heads,
    context: int = SMALL.context,
    mlp_width: int | None = None,
    every_position: bool = False,
    stages: int = 2,
) -> list[StageFactory]:
    """Byte-level GPT in one stage, or in two halves; seeds go to `*.mlp`.

    Two stages cannot share a tensor, so the second has a head of its own (256 * width weights
    more); one stage is a ByteGPT. By default only the byte after the window is predicted, which
    is what the data sets ask for; `context` must be no less than their window.
    """
    size = GPTSize(layers, width, heads, context, mlp_width)
    if stages == 1:
        return [StageFactory("model", partial(ByteGPT, size, every_position))]
    if stages != 2:
        raise ValueError(f"stages must be 1 or 2, got {stages}")
    first = (layers + 1) // 2
    return [
        StageFactory("reader", partial(GPTReader, size, first)),
        StageFactory("predictor", partial(GPTPredictor, size, layers - first, every_position)),
    ]


def _blocks(size: GPTSize, layers: int) -> nn.Sequential:
    return nn.Sequential(*(Block(size) for _ in range(layers)))


# ---- initial values ------------------------------------------------------------------------------


def _draw_key() -> int:
    """From torch's generator, before any module draws: how much they draw depends on sizes."""
    return int(torch.randint(2**62, (), device="cpu"))


@torch.no_grad()
def _initialise(model: nn.Module, size: GPTSize, key: int) -> None:
    """Weights N(0, 0.02), residual projections divided by sqrt(2 * layers), biases 0, norms 1.

    The same `key` gives the same values on every device, and models that differ in `mlp_width`
    share all values but those of the units that only the wider one has.
    """
    residual = _STD / math.sqrt(2 * size.layers)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.zero_()
        elif weight.ndim == 2 and not weight.is_meta:  # the rest are norms, which start at 1
            std = residual if name.endswith(("attention.out.weight", "mlp.down.weight")) else _STD
            weight.copy_(std * _normal(name, weight, size, key))


def _normal(name: str, weight: Tensor, size: GPTSize, key: int) -> Tensor:
    """Standard normal values for `weight`; an MLP's usual units are drawn before further ones."""
    generator = torch.Generator("cpu").manual_seed(stream_key(key, name))
    rows, columns = weight.T.shape if name.endswith("mlp.down.weight") else weight.shape
    first = min(rows, size.usual_mlp_units) if ".mlp." in name else rows
    parts = [
        torch.randn(count, columns, generator=generator, device="cpu")
        for count in (first, rows - first)
    ]
    values = torch.cat(parts)
    return values.T if name.endswith("mlp.down.weight") else values
