"""The stacked weights of all seeds of a layer, with their optimiser moments and safe copies."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from esper_ray.blueprints import Blueprint, BlueprintShape
from esper_ray.keyed_random import keyed_uniform, stream_key


class SeedBank(nn.Module):
    """Weights (seeds, ...) of one blueprint, one row per seed; nothing here loops over seeds.

    `tensors()` is everything that makes up a seed's row: weights, Adam moments and step count.
    `park` copies rows aside, `bring_back` restores them.
    """

    step_count: Tensor
    parked: Tensor

    def __init__(self, kind: Blueprint, shape: BlueprintShape, num_seeds: int) -> None:
        super().__init__()
        self.kind, self.shape, self.num_seeds = kind, shape, num_seeds
        self.specs = dict(kind.weights(shape))
        self.weights = nn.ParameterDict(
            {
                name: nn.Parameter(torch.zeros(num_seeds, *spec.shape))
                for name, spec in self.specs.items()
            }
        )
        self.register_buffer("step_count", torch.zeros(num_seeds, dtype=torch.int32))
        self.register_buffer("parked", torch.zeros(num_seeds, dtype=torch.bool))
        for name in self.specs:
            for moment in ("exp_avg", "exp_avg_sq"):
                self.register_buffer(f"{moment}_{name}", torch.zeros_like(self.weights[name]))
        for name, value in list(self.tensors().items()):
            self.register_buffer(f"copy_{name}", torch.zeros_like(value))

    @property
    def weights_per_seed(self) -> int:
        """Number of weights of one seed."""
        return sum(math.prod(spec.shape) for spec in self.specs.values())

    def moments(self, name: str) -> tuple[Tensor, Tensor]:
        """Adam's first and second moment of one weight, shaped as the weight."""
        return self.get_buffer(f"exp_avg_{name}"), self.get_buffer(f"exp_avg_sq_{name}")

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that holds a row per seed, detached, by name."""
        rows: dict[str, Tensor] = {"step_count": self.step_count}
        for name in self.specs:
            rows[name] = self.weights[name].detach()
            rows[f"exp_avg_{name}"], rows[f"exp_avg_sq_{name}"] = self.moments(name)
        return rows

    def copies(self) -> dict[str, Tensor]:
        """The parked counterpart of `tensors()`."""
        return {name: self.get_buffer(f"copy_{name}") for name in self.tensors()}

    def delta(self, x: Tensor, u: Tensor, rows: Tensor) -> Tensor:
        """What seeds `rows` would add at alpha 1 to their chunks x (..., len(rows), chunk).

        u (..., inputs) is the host's input; it is looked at only if the blueprint reads it.
        """
        if self.kind.reads_input() and u.shape[-1] != self.shape.inputs:
            raise ValueError(
                f"the host read {u.shape[-1]} features, but the seeds read {self.shape.inputs}"
            )
        stacked = {name: weight.index_select(0, rows) for name, weight in self.weights.items()}
        return self.kind.delta(stacked, x, u)

    @torch.no_grad()
    def reset(self, rows: Tensor, generation: Tensor, stream: str) -> None:
        """Give seeds `rows` newborn weights; they depend on stream, seed id and generation only."""
        identity = rows.to(torch.int64) << 16 | generation.to(torch.int64)
        for value in self.tensors().values():
            value[rows] = 0
        for name, spec in self.specs.items():
            if not spec.bound:
                continue
            uniform = keyed_uniform(stream_key(stream, name), identity, math.prod(spec.shape))
            values = ((uniform * 2 - 1) * spec.bound).view(-1, *spec.shape)
            self.weights[name][rows] = values.to(self.weights[name].dtype)

    @torch.no_grad()
    def park(self, rows: Tensor) -> None:
        """Copy seeds `rows` aside, over any older copy."""
        copies = self.copies()
        for name, value in self.tensors().items():
            copies[name][rows] = value[rows]
        self.parked[rows] = True

    @torch.no_grad()
    def bring_back(self, rows: Tensor) -> None:
        """Restore seeds `rows` from their copies; rows without a copy stay as they are."""
        kept = rows[self.parked[rows]]
        copies: Mapping[str, Tensor] = self.copies()
        for name, value in self.tensors().items():
            value[kept] = copies[name][kept]

    @torch.no_grad()
    def forget(self, rows: Tensor) -> None:
        """Drop what seeds `rows` hold and their copies."""
        for value in self.tensors().values():
            value[rows] = 0
        self.drop_copies(rows)

    @torch.no_grad()
    def drop_copies(self, rows: Tensor) -> None:
        """Drop the copies of seeds `rows`, which have nothing to go back to any more."""
        self.parked[rows] = False
