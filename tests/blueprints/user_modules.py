"""Modules that a user might write, as blueprints that are not registered."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from esper_ray.blueprints import BlueprintShape, ModuleBlueprint


class Adapter(ModuleBlueprint):
    """Layers of torch alone, the last one named."""

    blueprint_id = 9_001
    name = "adapter_for_tests"
    zero = ("3",)

    def module(self, shape: BlueprintShape) -> nn.Module:
        """Norm, up, SiLU, down."""
        return nn.Sequential(
            nn.LayerNorm(shape.chunk),
            nn.Linear(shape.chunk, shape.hidden),
            nn.SiLU(),
            nn.Linear(shape.hidden, shape.chunk),
        )


class Wave(nn.Module):
    """A constant buffer, and one matrix used twice."""

    phase: Tensor

    def __init__(self, shape: BlueprintShape) -> None:
        super().__init__()
        self.register_buffer("phase", torch.linspace(0, math.pi, shape.inputs))
        self.mix = nn.Linear(shape.inputs, shape.inputs, bias=False)
        self.again = nn.Linear(shape.inputs, shape.inputs, bias=False)
        self.again.weight = self.mix.weight
        self.out = nn.Linear(shape.inputs, shape.chunk)

    def forward(self, u: Tensor) -> Tensor:
        """The input through a sine, to a chunk."""
        out: Tensor = self.out(self.again(torch.sin(self.mix(u) + self.phase)))
        return out


class FromInput(ModuleBlueprint):
    """Reads the host's input."""

    blueprint_id = 9_002
    name = "from_input_for_tests"
    reads = "input"
    zero = ("out.weight", "out.bias")

    def module(self, shape: BlueprintShape) -> nn.Module:
        """A wave."""
        return Wave(shape)


class Gate(nn.Module):
    """The input opens the chunk; a parameter with no dimension scales it."""

    def __init__(self, shape: BlueprintShape) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))
        self.open = nn.Linear(shape.inputs, shape.chunk)

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        """Gated chunk."""
        return self.scale * x * torch.sigmoid(self.open(u))


class FromBoth(ModuleBlueprint):
    """Reads both; its own initialiser makes it zero."""

    blueprint_id = 9_003
    name = "from_both_for_tests"
    reads = "both"

    def module(self, shape: BlueprintShape) -> nn.Module:
        """A gate."""
        return Gate(shape)


class Whole(ModuleBlueprint):
    """Replaces its chunk."""

    blueprint_id = 9_004
    name = "whole_for_tests"
    residual = False

    def module(self, shape: BlueprintShape) -> nn.Module:
        """Two layers."""
        return nn.Sequential(
            nn.Linear(shape.chunk, shape.hidden), nn.Tanh(), nn.Linear(shape.hidden, shape.chunk)
        )


MODULES: list[ModuleBlueprint] = [Adapter(), FromInput(), FromBoth(), Whole()]
