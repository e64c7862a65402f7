"""What the class of a module says of its output and input, without calling it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from esper_ray.layers.mlp import elementwise, is_mlp


class Told(NamedTuple):
    """What a module's class says: features out, features in if they can be read, and where."""

    width: int
    inputs: int
    feature_dim: int = -1


_Conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_Transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ByChannel = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def _of_conv(conv: Any) -> Told:
    point = {*conv.kernel_size, *conv.stride} == {1} and conv.padding in {"same", "valid"} | {
        (0,) * n for n in (1, 2, 3)
    }
    return Told(conv.out_channels, conv.in_channels if point else 0, 1)


_SAYS: tuple[tuple[tuple[type[nn.Module], ...], Callable[[Any], Told]], ...] = (
    ((nn.Linear,), lambda m: Told(m.out_features, m.in_features)),
    (_Conv, _of_conv),
    (_Transposed, lambda m: Told(m.out_channels, 0, 1)),
    (_ByChannel, lambda m: Told(m.num_features, m.num_features, 1)),
    ((nn.GroupNorm,), lambda m: Told(m.num_channels, m.num_channels, 1)),
    (
        (nn.LayerNorm, nn.RMSNorm),
        lambda m: Told(m.normalized_shape[-1], m.normalized_shape[-1]),
    ),
    ((nn.Embedding, nn.EmbeddingBag), lambda m: Told(m.embedding_dim, 0)),
)


def read(module: nn.Module) -> Told | None:
    """What the class of a module says of its output and input; None if it says nothing."""
    if isinstance(module, nn.Sequential):
        return _of_sequential(module)
    return next((say(module) for kinds, say in _SAYS if isinstance(module, kinds)), None)


def _of_sequential(module: nn.Sequential) -> Told | None:
    """By the last child that says, if what follows it works on each element alone."""
    children = list(module)
    last = next((c for c in reversed(children) if not elementwise(c)), None)
    told = None if last is None else read(last)
    if told is None:
        return None
    first = next(c for c in children if not elementwise(c))
    inner = read(first)
    return told._replace(inputs=inner.inputs if inner is not None and is_mlp(module) else 0)
