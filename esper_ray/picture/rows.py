"""From seed columns and chunk bounds to a row per seed; pure."""

from __future__ import annotations

import difflib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from esper_ray.errors import ConfigError
from esper_ray.lifecycle import ExtendedLifecycle
from esper_ray.seeds.logical_seed import METRICS

SEEDS_PER_LINE: Final = 100


class Health(IntEnum):
    """How a seed is, from what its row holds; the first that applies, worst first.

    FAILING: more errors (optimiser steps whose gradient was not finite) than
    `lifecycle.error_limit`, above which a growing seed is culled or rolled back.
    ERRORS: at least one error. HARMFUL: when it was last judged the gate loss was lower without it,
    so its stored evaluation score is below 0. SOUND: judged, and not harmful. UNMEASURED: no loss
    of it was ever measured in this generation.
    """

    UNMEASURED = 0
    SOUND = 1
    HARMFUL = 2
    ERRORS = 3
    FAILING = 4


@dataclass(frozen=True, slots=True)
class Chunk:
    """Features `start` to `stop`, the last not included, and the seed that owns them.

    `score` is the relative gain of the gate loss when it was last judged; None, like a metric
    that is left out, if it was not measured.
    """

    seed_id: int
    start: int
    stop: int
    state: ExtendedLifecycle
    alpha: float
    health: Health
    errors: int
    score: float | None
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer that carries seeds; its chunks in the order of their features."""

    layer_id: str
    width: int
    chunks: tuple[Chunk, ...]

    @property
    def states(self) -> dict[str, int]:
        """Seeds by state, in the order of the lifecycle; states without a seed are left out."""
        return count_states(self.chunks)


@dataclass(frozen=True, slots=True)
class Picture:
    """What is drawn: the layers of a run, and where it was read."""

    title: str
    source: str
    layers: tuple[Layer, ...]

    @property
    def seeds(self) -> int:
        """Seeds of all layers."""
        return sum(len(layer.chunks) for layer in self.layers)

    def only(self, layer_id: str | None) -> Self:
        """The same with one layer, or as it is for None; ConfigError names the nearest layers."""
        if layer_id is None:
            return self
        found = tuple(layer for layer in self.layers if layer.layer_id == layer_id)
        if not found:
            known = [layer.layer_id for layer in self.layers]
            near = difflib.get_close_matches(layer_id, known, n=3, cutoff=0.0)
            raise ConfigError(
                f"no layer {layer_id!r} carries seeds",
                f"the nearest are {', '.join(near)}" if near else "no layer carries seeds here",
            )
        return replace(self, layers=found)

    def to_json(self, out: str) -> dict[str, Any]:
        """What the command prints for programs: where it was drawn, seeds by state."""
        layers = [
            {
                "layer_id": layer.layer_id,
                "width": layer.width,
                "seeds": len(layer.chunks),
                "states": layer.states,
            }
            for layer in self.layers
        ]
        return {"out": out, "layers": layers}


def chunk_rows(
    columns: Mapping[str, NDArray[Any]], bounds: NDArray[np.int64], error_limit: int
) -> tuple[Chunk, ...]:
    """A row per seed from a state table's columns and its (seeds + 1,) chunk bounds."""
    scores = columns["evaluation_score"].astype(np.float64) / 1000  # stored as fixed point
    values = columns["performance_metrics"]
    valid = (columns["metrics_valid"][:, None] >> np.arange(len(METRICS)) & 1 == 1) & (
        np.isfinite(values)
    )
    health = _health(columns["error_count"], valid[:, 0], scores, error_limit)
    starts = bounds.tolist()
    rows = zip(
        columns["lifecycle_state"].tolist(),
        columns["alpha"].tolist(),
        health.tolist(),
        columns["error_count"].tolist(),
        scores.tolist(),
        values.tolist(),
        valid.tolist(),
        strict=True,
    )
    return tuple(
        Chunk(
            seed_id=seed_id,
            start=starts[seed_id],
            stop=starts[seed_id + 1],
            state=ExtendedLifecycle(state),
            alpha=alpha,
            health=Health(code),
            errors=errors,
            score=score if measured[0] else None,
            metrics={n: v for n, v, m in zip(METRICS, metrics, measured, strict=True) if m},
        )
        for seed_id, (state, alpha, code, errors, score, metrics, measured) in enumerate(rows)
    )


def _health(
    errors: NDArray[np.int32],
    judged: NDArray[np.bool_],
    scores: NDArray[np.float64],
    error_limit: int,
) -> NDArray[np.int64]:
    return np.select(
        [errors > error_limit, errors > 0, judged & (scores < 0), judged],
        [Health.FAILING, Health.ERRORS, Health.HARMFUL, Health.SOUND],
        Health.UNMEASURED,
    )


def count_states(chunks: Sequence[Chunk]) -> dict[str, int]:
    """Seeds by state, in the order of the lifecycle."""
    counts = Counter(chunk.state for chunk in chunks)
    return {state.name: counts[state] for state in ExtendedLifecycle if counts[state]}


def lines(layer: Layer) -> list[tuple[Chunk, ...]]:
    """The chunks cut into lines of about equal length, to be drawn to one scale.

    There are at most as many lines as SEEDS_PER_LINE seeds in each would need.
    """
    if not layer.chunks:
        return []
    share = -(-layer.width // -(-len(layer.chunks) // SEEDS_PER_LINE))
    longest = share - 1 + max(chunk.stop - chunk.start for chunk in layer.chunks)
    found: list[list[Chunk]] = []
    for chunk in layer.chunks:
        if not found or chunk.stop - found[-1][0].start > longest:
            found.append([])
        found[-1].append(chunk)
    return [tuple(line) for line in found]


def same_runs(chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, ...]]:
    """Neighbours of equal state, alpha to three digits, and health, taken together."""
    keys = itertools.groupby(chunks, key=lambda c: (c.state, round(c.alpha, 3), c.health))
    return (tuple(group) for _, group in keys)
