"""A host layer and its seeds as one module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from esper_ray.errors import ConfigError
from esper_ray.layers.hook import FRESH_OUTPUT
from esper_ray.layers.layer_seeds import LayerSeeds


class ChunkedKasminaLayer(LayerSeeds):
    """Runs `base_layer` and adds alpha times what each seed has grown to its chunk.

    `width`, the size of the last dimension of the output, is read off a Linear. To give seeds to
    a module inside a model, and leave the model's names as they are, see `attach_seeds`.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        num_seeds: int = 1000,
        layer_id: str = "layer",
        device: torch.device | str | None = None,
        *,
        width: int | None = None,
        inputs: int | None = None,
        **given: Any,
    ) -> None:
        width = width if width is not None else getattr(base_layer, "out_features", None)
        if not isinstance(width, int):
            raise ConfigError(
                f"the output width of layer {layer_id!r} is unknown",
                "pass width, the size of the last dimension of its output",
            )
        known = getattr(base_layer, "in_features", 0) if inputs is None else inputs
        weights = sum(p.numel() for p in base_layer.parameters())
        super().__init__(width, num_seeds, layer_id, inputs=known, host_weights=weights, **given)
        self.base_layer = base_layer
        self.in_place = type(base_layer) in FRESH_OUTPUT and not base_layer._forward_hooks
        self.to(device)

    def host_parameters(self) -> list[nn.Parameter]:
        """Parameters of the base layer alone."""
        return list(self.base_layer.parameters())

    def forward(self, x: Tensor, alpha: Tensor | None = None) -> Tensor:
        """Base output (..., width) with the seeds blended in; `alpha` as in `blend`."""
        return self.blend(self.base_layer(x), x, alpha, in_place=self.in_place)
