"""What a session shows: plans, states and transitions as small frozen tables."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final

ROOT: Final = "(model)"
"""What is shown for the empty name of the model itself."""


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """One matched module: what it is, and what its seeds add if each of them grows."""

    layer: str
    kind: str
    width: int
    seeds: int
    chunk: int
    blueprint: str
    host_parameters: int
    seed_parameters: int
    bytes: int


@dataclass(frozen=True, slots=True)
class SeedPlan:
    """What `attach` would do; prints as a table."""

    layers: tuple[PlannedLayer, ...]

    def __str__(self) -> str:
        """One line per layer."""
        names = PlannedLayer.__slots__
        head = tuple(name.replace("_", " ") for name in names)
        rows = [tuple(str(getattr(layer, n)) for n in names) for layer in self.layers]
        return _table([head, *((row[0] or ROOT, *row[1:]) for row in rows)])


@dataclass(frozen=True, slots=True)
class LayerStates:
    """Names of the states of a layer's seeds, by seed id."""

    layer: str
    names: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Seeds by state, states without any left out."""
        return dict(Counter(self.names))

    def __str__(self) -> str:
        """`layer: 3 DORMANT, 1 TRAINING`."""
        counted = ", ".join(f"{n} {state}" for state, n in self.counts.items())
        return f"{self.layer or ROOT}: {counted}"


@dataclass(frozen=True, slots=True, repr=False)
class States:
    """The states of all seeds; prints one line per layer."""

    layers: tuple[LayerStates, ...]

    def __getitem__(self, layer: str) -> LayerStates:
        for one in self.layers:
            if one.layer == layer:
                return one
        raise KeyError(f"no layer {layer!r} carries seeds")

    @property
    def counts(self) -> dict[str, int]:
        """Seeds of all layers by state."""
        return dict(Counter(name for layer in self.layers for name in layer.names))

    def __str__(self) -> str:
        """One line per layer."""
        return "\n".join(str(layer) for layer in self.layers)

    __repr__ = __str__


@dataclass(frozen=True, slots=True)
class SeedEvent:
    """One change of a seed's state, made after optimiser step `step`, at the end of `epoch`."""

    epoch: int
    step: int
    layer: str
    seed_id: int
    generation: int
    source: str
    target: str
    cause: str


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
