"""The blueprints that come with esper_ray."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import gelu

from esper_ray.blueprints.registry import (
    Blueprint,
    BlueprintShape,
    WeightSpec,
    register_blueprint,
)
from esper_ray.kernels import Form


def _each(x: Tensor, weight: Tensor) -> Tensor:
    """x (samples, rows, n) by weight (rows, n, m): each row by its own matrix.

    Samples lie innermost while it is computed: on a CPU one product per row over contiguous
    samples is several times faster than one over strided ones.
    """
    return torch.bmm(weight.transpose(1, 2), x.permute(1, 2, 0)).permute(2, 0, 1)


def _all(u: Tensor, weight: Tensor) -> Tensor:
    """u (samples, n) by weight (rows, n, m): every row reads the same u, so it is one product."""
    rows, inputs, outputs = weight.shape
    side_by_side = weight.transpose(0, 1).reshape(inputs, rows * outputs)
    return (u @ side_by_side).view(u.shape[0], rows, outputs)


class _TwoLayer(Blueprint):
    def forward(self, weights: Mapping[str, Tensor], x: Tensor, u: Tensor) -> Tensor:
        del u
        hidden = torch.relu(_each(x, weights["w_in"]) + weights["b_in"])
        return _each(hidden, weights["w_out"]) + weights["b_out"]

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
    fused = Form("w_in", None, "relu")

    def weights(self, shape: BlueprintShape) -> Mapping[str, WeightSpec]:
        """Ordinary input projection, zero output projection."""
        return self._shapes(shape, out_bound=0.0)


@register_blueprint
class AutoencoderBlueprint(_TwoLayer):
    """Full: learns to reproduce its chunk, for the `reconstruction` objective."""

    blueprint_id = 1
    name = "autoencoder"
    residual = False
    fused = Form("w_in", None, "relu", residual=False)

    def weights(self, shape: BlueprintShape) -> Mapping[str, WeightSpec]:
        """Ordinary initialisation of both projections."""
        return self._shapes(shape, out_bound=shape.hidden**-0.5)


@register_blueprint
class LowRankBlueprint(Blueprint):
    """Residual: a linear map of the chunk through `hidden` dimensions, zero at birth."""

    blueprint_id = 2
    name = "low_rank"
    residual = True
    fused = Form("w_in", None, "identity", biases=False)
    linear = True

    def weights(self, shape: BlueprintShape) -> Mapping[str, WeightSpec]:
        """Ordinary first factor, zero second factor."""
        return {
            "w_in": WeightSpec((shape.chunk, shape.hidden), shape.chunk**-0.5),
            "w_out": WeightSpec((shape.hidden, shape.chunk)),
        }

    def forward(self, weights: Mapping[str, Tensor], x: Tensor, u: Tensor) -> Tensor:
        """Both factors, one after the other."""
        del u
        return _each(_each(x, weights["w_in"]), weights["w_out"])


@register_blueprint
class AffineBlueprint(Blueprint):
    """Residual: scales and shifts each feature of the chunk; `hidden` plays no part."""

    blueprint_id = 3
    name = "affine"
    residual = True
    linear = True

    def weights(self, shape: BlueprintShape) -> Mapping[str, WeightSpec]:
        """Zeros: the gradient reaches both, since neither hides the other."""
        return {"scale": WeightSpec((shape.chunk,)), "shift": WeightSpec((shape.chunk,))}

    def forward(self, weights: Mapping[str, Tensor], x: Tensor, u: Tensor) -> Tensor:
        """Feature by feature."""
        del u
        return x * weights["scale"] + weights["shift"]


class _FedMlp(Blueprint):
    residual = True

    def weights(self, shape: BlueprintShape) -> Mapping[str, WeightSpec]:
        """Ordinary input projections, zero output projection."""
        self.require_input(shape)
        chunk = {"w_chunk": WeightSpec((shape.chunk, shape.hidden), shape.chunk**-0.5)}
        return {
            "w_in": WeightSpec((shape.inputs, shape.hidden), shape.inputs**-0.5),
            **(chunk if self.reads == "both" else {}),
            "b_in": WeightSpec((shape.hidden,)),
            "w_out": WeightSpec((shape.hidden, shape.chunk)),
            "b_out": WeightSpec((shape.chunk,)),
        }

    def forward(self, weights: Mapping[str, Tensor], x: Tensor, u: Tensor) -> Tensor:
        hidden = _all(u, weights["w_in"]) + weights["b_in"]
        if self.reads == "both":
            hidden = hidden + _each(x, weights["w_chunk"])
        return _each(gelu(hidden), weights["w_out"]) + weights["b_out"]


@register_blueprint
class InputMlpBlueprint(_FedMlp):
    """Residual: the host's whole input -> hidden -> chunk with GELU, zero output at birth."""

    blueprint_id = 4
    name = "input_mlp"
    reads = "input"
    fused = Form(None, "w_in", "gelu")


@register_blueprint
class InputChunkMlpBlueprint(_FedMlp):
    """Residual: the host's whole input and the chunk -> hidden -> chunk with GELU."""

    blueprint_id = 5
    name = "input_chunk_mlp"
    reads = "both"
    fused = Form("w_chunk", "w_in", "gelu")
