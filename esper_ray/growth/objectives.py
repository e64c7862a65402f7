"""What a seed in TRAINING learns.

Every objective here is a target for delta, the change that the seed would make to its chunk at
alpha 1: the seed regresses delta onto the target. Definitions: docs/growth.md, section 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from esper_ray.blueprints import Blueprint
from esper_ray.errors import ConfigError
from esper_ray.seeds import ChunkManager

Target = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def gradient_step(g: Tensor, h_rms: Tensor, g_rms: Tensor, k: float) -> Tensor:
    """-k * rms(h) / rms(g) * g: a step against the task gradient, free of the loss scale.

    g is the gradient at some chunks; the scalars rms are over all samples and features of the
    layer.
    """
    return g * (-k * h_rms / (g_rms + 1e-12))


def no_change(g: Tensor, h_rms: Tensor, g_rms: Tensor, k: float) -> Tensor:
    """Zero: delta = B(h) - h = 0 means that the seed reproduces its chunk."""
    del h_rms, g_rms, k
    return torch.zeros_like(g)


@dataclass(frozen=True, slots=True)
class Objective:
    """A target for delta and the family of blueprints that it makes sense for."""

    target: Target
    residual: bool


OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        "gradient_target": Objective(gradient_step, residual=True),
        "reconstruction": Objective(no_change, residual=False),
    }
)


def objective(name: str, kind: Blueprint) -> Objective:
    """The objective of that name, if `kind` can learn it; ConfigError says what fits."""
    if name not in OBJECTIVES:
        raise ConfigError(
            f"no objective is named {name!r}", f"choose one of: {', '.join(OBJECTIVES)}"
        )
    chosen = OBJECTIVES[name]
    if chosen.residual != kind.residual:
        form = "residual" if kind.residual else "full"
        fitting = [n for n, o in OBJECTIVES.items() if o.residual == kind.residual]
        raise ConfigError(
            f"objective {name!r} does not fit blueprint {kind.name!r}, which is {form}",
            f"with {kind.name!r} choose objective {' or '.join(map(repr, fitting))}",
        )
    return chosen


def chunk_mean(values: Tensor, chunks: ChunkManager, rows: Tensor) -> Tensor:
    """Mean of values (samples, ..., rows, chunk) over samples and the features of each chunk."""
    valid = chunks.valid.index_select(0, rows)
    samples = values.numel() // valid.numel()
    total = values.masked_fill(~valid, 0.0).flatten(0, -3).sum((0, 2))
    return total / (samples * chunks.sizes.index_select(0, rows))


def local_loss(delta: Tensor, target: Tensor, chunks: ChunkManager, rows: Tensor) -> Tensor:
    """(rows,) mean squared distance of delta to its target, both (samples, ..., rows, chunk)."""
    return chunk_mean((delta - target).pow(2), chunks, rows)
