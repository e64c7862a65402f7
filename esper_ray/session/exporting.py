"""A grown model without its seeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class NotFolded:
    """A layer whose seeds are no part of its own weights."""

    layer: str
    reason: str


@dataclass
class Exported:
    """A model that needs no seeds."""

    model: nn.Module
    not_folded: list[NotFolded] = field(default_factory=list)


def export(model: nn.Module, sample: Any = None) -> Exported:
    """Not yet."""
    raise NotImplementedError(type(model), sample)
