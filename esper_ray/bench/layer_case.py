"""One layer with seeds, its bare host, and the plain loop over seeds that others would write."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu

from esper_ray.layers import ChunkedKasminaLayer


@dataclass(frozen=True, slots=True)
class LayerCase:
    """Sizes of a layer; `active` is the share of seeds that are blended in."""

    inputs: int
    width: int
    seeds: int
    hidden: int
    samples: int
    active: float
    device: str
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """<device>/<seeds>/<features per chunk>/<share at work>."""
        return f"{self.device}/{self.seeds}/{self.width // self.seeds}/{self.active:.0%}"

    def build(self) -> tuple[ChunkedKasminaLayer, Tensor]:
        """The layer, and ids of its active seeds, drawn at random under a fixed seed."""
        torch.manual_seed(0)
        host = nn.Linear(self.inputs, self.width, device=self.device, dtype=self.dtype)
        layer = ChunkedKasminaLayer(host, self.seeds, hidden=self.hidden, device=self.device)
        count = max(1, round(self.active * self.seeds)) if self.active else 0
        ids = torch.randperm(self.seeds)[:count].sort().values.to(self.device)
        if count:
            layer.bank.reset(ids, layer.state.generation[ids], "bench")
            with torch.no_grad():
                for weight in layer.bank.weights.values():
                    weight.normal_(0.0, 0.1)
            layer.state.alpha[ids] = 0.5
            layer.refresh()
        return layer, ids

    def batches(self, count: int) -> list[Tensor]:
        """Inputs that the caller goes through in turn."""
        shape = (self.samples, self.inputs)
        return [torch.randn(shape, device=self.device, dtype=self.dtype) for _ in range(count)]


class PlainLoop:
    """The same arithmetic seed by seed: one call per seed, and a read of each on the host."""

    def __init__(self, layer: ChunkedKasminaLayer) -> None:
        self._layer = layer
        self._sizes = layer.chunks.sizes.tolist()

    @torch.no_grad()
    def __call__(self, x: Tensor, *, telemetry: bool) -> Tensor:
        """Output with seeds blended in; telemetry reads two sums of every chunk."""
        layer, parts = self._layer, []
        weights, slots = layer.bank.weights, layer.bank.slot_of_seed.tolist()
        for seed, chunk in enumerate(layer.base_layer(x).split(self._sizes, -1)):
            alpha = layer.state.alpha[seed].item()
            if alpha > 0:
                own = {name: w[slots[seed]].to(x.dtype) for name, w in weights.items()}
                used = chunk.shape[-1]
                hidden = relu(linear(chunk, own["w_in"][:used].T, own["b_in"]))
                grown = linear(hidden, own["w_out"][:, :used].T, own["b_out"][:used])
                parts.append(chunk + alpha * grown)
            else:
                parts.append(chunk)
            if telemetry:
                chunk.mean().item()
                chunk.square().mean().item()
        return torch.cat(parts, -1)
