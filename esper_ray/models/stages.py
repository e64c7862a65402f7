"""What the runtime needs of a model: its stages, each buildable alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class StageFactory:
    """Name of a stage and a function that builds it; a layer actor builds its own stage only."""

    name: str
    build: Callable[[], nn.Module]
