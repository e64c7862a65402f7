"""What the seeds of a layer cost, before any of them is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from esper_ray.blueprints import Blueprint, BlueprintShape
from esper_ray.seeds.bank import SeedBank
from esper_ray.seeds.chunks import ChunkManager


@dataclass(frozen=True, slots=True)
class SeedPrice:
    """Features of the widest chunk; weights and bytes if every seed grows."""

    chunk: int
    parameters: int
    bytes: int


def price(
    width: int,
    num_seeds: int,
    chunk_sizes: Sequence[int] | None,
    kind: Blueprint,
    hidden: int,
    inputs: int,
) -> SeedPrice:
    """The price of `num_seeds` seeds that divide `width` features; ConfigError if they cannot."""
    chunk = ChunkManager(width, num_seeds, chunk_sizes).chunk_width
    with torch.device("meta"):
        bank = SeedBank(kind, BlueprintShape(chunk, hidden, inputs), num_seeds)
        bank.resize(num_seeds)
    held = sum(tensor.nbytes for tensor in (*bank.parameters(), *bank.buffers()))
    return SeedPrice(chunk, bank.weights_per_seed * num_seeds, held)
