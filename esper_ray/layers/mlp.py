"""What in a model counts as an MLP, whose input seeds read by default."""

from __future__ import annotations

from typing import Final

from torch import nn

_EACH: Final = (nn.Identity, nn.Dropout)
_MAPS: Final = (nn.Linear, nn.LayerNorm, nn.RMSNorm)


def elementwise(module: nn.Module) -> bool:
    """Whether a module works on each element alone, as activations do."""
    softmax = isinstance(module, nn.Softmax | nn.LogSoftmax | nn.MultiheadAttention)
    activation = type(module).__module__ == "torch.nn.modules.activation" and not softmax
    return activation or isinstance(module, _EACH)


def is_mlp(module: nn.Module) -> bool:
    """Whether its leaves are Linear, with norms of features and what works on each element."""
    leaves = [m for m in module.modules() if next(m.children(), None) is None]
    return any(isinstance(m, nn.Linear) for m in leaves) and all(
        isinstance(m, _MAPS) or elementwise(m) for m in leaves
    )
