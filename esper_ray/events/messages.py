"""Messages between layers and coordinator: plain arrays, one row per seed concerned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esper_ray.lifecycle import Cause, ExtendedLifecycle, Refusal

_REPLANT, _DORMANT = int(Cause.REPLANT), int(ExtendedLifecycle.DORMANT)
Ints = NDArray[np.int32]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class GraftingSignals:
    """What grafting strategies read in one epoch: a row per seed in GRAFTING, ids ascending.

    Every measure is (rows,) float64, NaN = not measured: relative weight change per step, gate
    loss gained by the seed, variance of the last gate losses and accuracies, gradient norm.
    """

    seed_ids: NDArray[np.int64]
    weight_drift: NDArray[np.float64]
    performance_delta: NDArray[np.float64]
    loss_variance: NDArray[np.float64]
    gradient_norm: NDArray[np.float64]
    accuracy_variance: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TelemetryBatch:
    """What a layer saw in one lifecycle epoch; every array is (seeds,), NaN = not measured."""

    layer_id: str
    epoch: int
    state: Ints
    epochs_in_state: Ints
    generation: NDArray[np.int16]
    alpha: Floats
    error_count: Ints
    local_loss: Floats
    delta_ratio: Floats
    chunk_mean: Floats
    chunk_variance: Floats
    chunk_gradient: Floats
    strategy: Ints
    last_change: Ints
    """Lifecycle epoch of a seed's last transition, -1 = none yet."""
    errors: Ints
    """Errors counted in this epoch."""
    signals: GraftingSignals
    """What the strategies read in this epoch, a row per seed that was in GRAFTING."""
    parameter_share: float
    """Weights of one blueprint over weights of the host layer."""


@dataclass(frozen=True, slots=True)
class TransitionBatch:
    """Transitions planned for one layer; a row applies if state and generation are as expected.

    `blueprint_id`, `strategy` and `checkpoint_id` are -1 where the row keeps its own.
    """

    layer_id: str
    number: int
    epoch: int
    seed_ids: NDArray[np.int64]
    expected_state: Ints
    expected_generation: NDArray[np.int16]
    target: Ints
    cause: Ints
    blueprint_id: Ints
    strategy: Ints
    checkpoint_id: Ints

    @property
    def replants(self) -> NDArray[np.bool_]:
        """(rows,) True where a terminal seed starts a new generation, which is no transition."""
        return np.equal(self.cause, _REPLANT) & np.equal(self.target, _DORMANT)

    def take(self, mask: NDArray[Any]) -> TransitionBatch:
        """The rows that a mask or an array of positions picks."""
        return TransitionBatch(
            self.layer_id,
            self.number,
            self.epoch,
            self.seed_ids[mask],
            self.expected_state[mask],
            self.expected_generation[mask],
            self.target[mask],
            self.cause[mask],
            self.blueprint_id[mask],
            self.strategy[mask],
            self.checkpoint_id[mask],
        )


@dataclass(frozen=True, slots=True)
class TransitionReceipt:
    """Which rows of a batch changed the layer, and after which optimiser step."""

    layer_id: str
    number: int
    step: int
    applied: NDArray[np.bool_]
    reason: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class MetricsBatch:
    """Measured metrics of some seeds of a layer.

    `metrics` is (rows, 4): loss, accuracy, stability, efficiency; bit i of `valid` says that
    column i was measured. `score` is the performance delta, NaN = not measured. The variances of
    the last gate losses and accuracies are the same for all seeds.
    """

    layer_id: str
    seed_ids: NDArray[np.int64]
    metrics: Floats
    valid: NDArray[np.uint8]
    score: Floats
    loss_variance: float = math.nan
    accuracy_variance: float = math.nan


@dataclass(frozen=True, slots=True)
class EvaluationRequest:
    """Losses of one split under K settings of alpha; setting 0 is the model as it is.

    `alphas[layer_id]` is (K, seeds) float32; a layer that is absent keeps its own alphas.
    """

    number: int
    split: str
    settings: int
    alphas: Mapping[str, Floats]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Result of an EvaluationRequest; every array is (K,).

    `change` is mean(loss of setting k - loss of setting 0) over the samples, `change_low` and
    `change_high` bound it with 95 % confidence (paired bootstrap).
    """

    loss: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    change: NDArray[np.float64]
    change_low: NDArray[np.float64]
    change_high: NDArray[np.float64]
    samples: int


@dataclass(frozen=True, slots=True)
class StageReport:
    """One stage at the end of a lifecycle epoch; `losses` is empty but on the last stage."""

    stage: int
    epoch: int
    step: int
    telemetry: tuple[TelemetryBatch, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one seed of a request; `refusal` is Refusal.NONE where it was done."""

    number: int
    action: str
    layer_id: str
    seed_id: int
    refusal: Refusal


@dataclass(frozen=True, slots=True)
class EpochReport:
    """What an epoch did: losses in nats, seeds by layer and state, applied moves."""

    epoch: int
    step: int
    losses: tuple[float, ...]
    gate_loss: float
    gate_accuracy: float
    seeds: Mapping[str, Mapping[str, int]]
    moves: tuple[tuple[str, int, str, str], ...]
    """(layer id, seed id, from, to)"""
    transitions: int
    states_visited: tuple[str, ...]
    commit: int | None
    answers: tuple[Answer, ...] = ()
    upload_error: str = ""
    """Why a commit that was due is not stored yet."""
    notes: tuple[str, ...] = ()
    """What went wrong and was dealt with."""
