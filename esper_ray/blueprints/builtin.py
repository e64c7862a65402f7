"""The blueprints that come with esper_ray."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from esper_ray.blueprints.registry import (
    Blueprint,
    BlueprintShape,
    WeightSpec,
    register_blueprint,
)


def _linear(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """x (..., rows, n) by weight (rows, n, m) plus bias (rows, m)."""
    return torch.einsum("...rn,rnm->...rm", x, weight) + bias


class _TwoLayer(Blueprint):
    def forward(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        hidden = torch.relu(_linear(weights["w_in"], weights["b_in"], x))
        return _linear(weights["w_out"], weights["b_out"], hidden)

    def _shapes(self, shape: BlueprintShape, out_bound: float) -> Mapping[str, WeightSpec]:
        chunk, hidden = shape.chunk, shape.hidden
        return {
            "w_in": WeightSpec((chunk, hidden), chunk**-0.5),
            "b_in": WeightSpec((hidden,)),
            "w_out": WeightSpec((hidden, chunk), out_bound),
            "b_out": WeightSpec((chunk,)),
        }


@register_blueprint
class BottleneckBlueprint(_TwoLayer):
    """Residual: chunk -> hidden -> chunk with ReLU, zero output at birth."""

    blueprint_id = 0
    name = "bottleneck"
    residual = True

    def weights(self, shape: BlueprintShape) -> Mapping[str, WeightSpec]:
        """Ordinary input projection, zero output projection."""
        return self._shapes(shape, out_bound=0.0)


@register_blueprint
class AutoencoderBlueprint(_TwoLayer):
    """Full: learns to reproduce its chunk, for the `reconstruction` objective."""

    blueprint_id = 1
    name = "autoencoder"
    residual = False

    def weights(self, shape: BlueprintShape) -> Mapping[str, WeightSpec]:
        """Ordinary initialisation of both projections."""
        return self._shapes(shape, out_bound=shape.hidden**-0.5)
