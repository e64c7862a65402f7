"""Seeds that are a linear map of what their host puts out, as part of the host's own weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from esper_ray.layers import LayerSeeds, Output

_FEATURES_AT = {nn.Linear: -1, nn.Conv1d: 1, nn.Conv2d: 1, nn.Conv3d: 1}


def obstacle(model: nn.Module, host: nn.Module, seeds: LayerSeeds, output: Output) -> str | None:
    """Why the blended seeds of `host` cannot become part of its weights; None if they can."""
    kind = seeds.bank.kind
    if not kind.linear:
        return f"blueprint {kind.name!r} is not a linear map of its chunk"
    if type(host) not in _FEATURES_AT or getattr(host, "groups", 1) != 1:
        return f"a {type(host).__name__} has no weights that could take over a linear map"
    if output.part is not None or output.feature_dim not in (_FEATURES_AT[type(host)],):
        return "the seeds divide another dimension than the one that its weights put out"
    if len(host._forward_hooks) > 1:
        return "another forward hook of the host sees its output"
    if any(_shared(model, parameter) for parameter in host.parameters(recurse=False)):
        return "its weights are shared with another module"
    return None


def _shared(model: nn.Module, parameter: nn.Parameter) -> bool:
    holders = [m for m in model.modules() if any(p is parameter for p in m._parameters.values())]
    return len(holders) > 1


@torch.no_grad()
def fold(host: Any, seeds: LayerSeeds) -> None:
    """Change weight and bias of a Linear or convolution so that it puts out what both did.

    Computed in float64 and rounded once to the host's dtype; a host without a bias gets one only
    where the seeds add a constant.
    """
    matrix, shift = _linear_map(seeds, host.weight.device)
    weight = host.weight.double().flatten(1)  # (out, in * kernel)
    bias = shift if host.bias is None else host.bias.double() @ matrix + shift
    host.weight.copy_((matrix.T @ weight).view_as(host.weight))
    if host.bias is not None:
        host.bias.copy_(bias)
    elif bool((bias != 0).any()):
        host.bias = nn.Parameter(bias.to(host.weight.dtype))


def _linear_map(seeds: LayerSeeds, device: torch.device) -> tuple[Tensor, Tensor]:
    """(width, width) A and (width,) c with blend(h) = h A + c, found by trying every feature."""
    width = seeds.chunks.width
    origin = torch.zeros(1, width, dtype=torch.float64, device=device)
    shift = seeds.blend(origin, None)
    unit = torch.eye(width, dtype=torch.float64, device=device)
    return seeds.blend(unit, None) - shift, shift[0]
