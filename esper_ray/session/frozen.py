"""Blended seeds as plain tensors and operations, for a tracer to see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper_ray.blueprints import Blueprint
from esper_ray.layers import LayerSeeds, SeedHook
from esper_ray.layers.hook import CHILD, detach_seeds, output_of_seeds


class FrozenSeeds(nn.Module):
    """The blended seeds of a layer and no others, without telemetry, moments or copies."""

    def __init__(self, seeds: LayerSeeds) -> None:
        super().__init__()
        rows = seeds.rows("blended")
        self._kind: Blueprint = seeds.bank.kind
        self._chunks, self._rows = seeds.chunks, rows
        slots = seeds.bank.slots(rows.ids)
        for name, weight in seeds.bank.weights.items():
            self.register_parameter(name, nn.Parameter(weight.detach()[slots]))
        self.register_buffer("alpha", seeds.state.alpha[rows.ids][:, None].clone())

    def blend(self, h: Tensor, u: Tensor | None) -> Tensor:
        """h (..., width) with the seeds blended in."""
        flat = h.reshape(-1, self._chunks.width)
        x = self._chunks.take(flat, self._rows)
        read = x[:, 0, :0]
        if self._kind.reads_input() and u is not None:
            read = u.reshape(-1, u.shape[-1])
        weights = {name: w.to(x.dtype) for name, w in self.named_parameters()}
        delta = self._kind.delta(weights, x, read)
        blended = (self.get_buffer("alpha") * delta).to(h.dtype)
        return self._chunks.add(flat, self._rows, blended).view(h.shape)


@dataclass(frozen=True, slots=True)
class FrozenHook(SeedHook):
    """A SeedHook for frozen seeds."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        """The output with the seeds blended in."""
        seeds = module.get_submodule(CHILD)
        if not isinstance(seeds, FrozenSeeds):
            raise TypeError(f"{CHILD} is a {type(seeds).__name__}")
        h = self.output.find(output)
        return self.output.replace(output, seeds.blend(h, self._read(args, kwargs, h)))


def freeze(host: nn.Module, seeds: LayerSeeds) -> None:
    """Put frozen seeds in the place of a host's seeds."""
    output = output_of_seeds(host)
    with torch.no_grad():
        frozen = FrozenSeeds(seeds)
    detach_seeds(host)
    host.add_module(CHILD, frozen)
    host.register_forward_hook(FrozenHook(output), with_kwargs=True)
