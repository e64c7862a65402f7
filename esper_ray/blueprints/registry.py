"""Blueprints by name and by stable number."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from esper_ray.errors import ConfigError
from esper_ray.kernels import Form
from esper_ray.keyed_random import keyed_uniform, stream_key


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """Shape of one weight of one seed; `bound` b initialises it uniformly in [-b, b), 0 = zeros."""

    shape: tuple[int, ...]
    bound: float = 0.0


@dataclass(frozen=True, slots=True)
class BlueprintShape:
    """Sizes that a blueprint is built for: features of its chunk, hidden units, features of the
    host's input, 0 where that cannot be read."""

    chunk: int
    hidden: int
    inputs: int = 0

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.hidden < 1:
            raise ConfigError(
                f"a blueprint cannot have chunk {self.chunk} and hidden {self.hidden}",
                "give both sizes of at least 1",
            )


class Blueprint(ABC):
    """A small module that writes one chunk, computed for many seeds at once.

    It reads its chunk, the host layer's whole input, or both. A residual blueprint's output is
    added to the chunk, and is zero at birth; the output of a full one replaces the chunk.
    `blueprint_id` is what the state tensor and checkpoints hold.
    """

    blueprint_id: ClassVar[int]
    name: ClassVar[str]
    residual: ClassVar[bool]
    reads: ClassVar[Literal["chunk", "input", "both"]] = "chunk"
    fused: ClassVar[Form | None] = None
    """What the fused kernels compute in place of `forward`; None where none of them can."""
    linear: ClassVar[bool] = False
    """Whether delta is a linear map of the chunk plus a constant, which a Linear can take over."""

    @abstractmethod
    def weights(self, shape: BlueprintShape) -> Mapping[str, WeightSpec]:
        """The weights of one seed, by name."""

    def newborn(self, shape: BlueprintShape, identity: Tensor, stream: str) -> Mapping[str, Tensor]:
        """Weights of newborn seeds, stacked; one that is left out is zero.

        Those of a row follow from `stream` and its number in `identity` (rows,) int64 alone.
        """
        drawn: dict[str, Tensor] = {}
        for name, spec in self.weights(shape).items():
            if spec.bound:
                count = math.prod(spec.shape)
                uniform = keyed_uniform(stream_key(stream, name), identity, count)
                drawn[name] = ((uniform * 2 - 1) * spec.bound).view(-1, *spec.shape)
        return drawn

    @abstractmethod
    def forward(self, weights: Mapping[str, Tensor], x: Tensor, u: Tensor) -> Tensor:
        """Chunks x (samples, rows, chunk) and the host's input u (samples, inputs), to x's shape.

        Each weight is stacked over rows in front. Only what `reads` names may be looked at.
        """

    def delta(self, weights: Mapping[str, Tensor], x: Tensor, u: Tensor) -> Tensor:
        """What the seeds would add to their chunks at alpha 1; shaped as x."""
        out = self.forward(weights, x, u)
        return out if self.residual else out - x

    def reads_input(self) -> bool:
        """Whether it looks at the host's input."""
        return self.reads != "chunk"

    def require_input(self, shape: BlueprintShape) -> None:
        """ConfigError where it reads the host's input and the layer hides that."""
        if self.reads_input() and shape.inputs < 1:
            raise ConfigError(
                f"blueprint {self.name!r} reads the host layer's input, which this layer hides",
                "target a module of one float tensor in and one out, such as a Linear, or choose "
                "a blueprint that reads its chunk",
            )


_BY_NAME: dict[str, Blueprint] = {}


def register_blueprint(kind: type[Blueprint]) -> type[Blueprint]:
    """Class decorator; name and number must both be new."""
    if not 0 <= kind.blueprint_id < 2**31:
        raise ValueError(f"blueprint {kind.name!r} needs an id in 0..2**31-1: {kind.blueprint_id}")
    for known in _BY_NAME.values():
        if known.name == kind.name or known.blueprint_id == kind.blueprint_id:
            raise ValueError(
                f"blueprint {kind.name!r} with id {kind.blueprint_id} collides with "
                f"{known.name!r}, id {known.blueprint_id}"
            )
    _BY_NAME[kind.name] = kind()
    return kind


def blueprint_names() -> tuple[str, ...]:
    """Names of all registered blueprints, sorted."""
    return tuple(sorted(_BY_NAME))


def blueprint(name: str) -> Blueprint:
    """The blueprint of that name; ConfigError lists the known ones."""
    if name not in _BY_NAME:
        known = ", ".join(blueprint_names())
        raise ConfigError(f"no blueprint is named {name!r}", f"choose one of: {known}")
    return _BY_NAME[name]
