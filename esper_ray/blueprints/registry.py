"""Blueprints by name and by stable number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from esper_ray.errors import ConfigError


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

    @abstractmethod
    def weights(self, shape: BlueprintShape) -> Mapping[str, WeightSpec]:
        """The weights of one seed, by name."""

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


_BY_NAME: dict[str, Blueprint] = {}


def register_blueprint(kind: type[Blueprint]) -> type[Blueprint]:
    """Class decorator; name and number must both be new."""
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
