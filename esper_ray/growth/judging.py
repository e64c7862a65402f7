"""Counterfactuals of single seeds: which alphas to try, and what the losses then say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from esper_ray.events.messages import (
    Evaluation,
    EvaluationRequest,
    MetricsBatch,
    TelemetryBatch,
)
from esper_ray.policy import Measurement

SETTINGS_AT_ONCE = 32
STABILITY_WINDOW = 5

Seed = tuple[str, int]


def counterfactual_requests(
    telemetry: Mapping[str, TelemetryBatch], seeds: Sequence[Seed], first_number: int
) -> Iterator[tuple[list[Seed], EvaluationRequest]]:
    """Requests in which setting 0 is the model as it is and each further one flips one seed.

    A blended seed is switched off, a hidden one to alpha 1. Without seeds there is one request,
    for the baseline alone.
    """
    room = SETTINGS_AT_ONCE - 1
    groups = [list(seeds[i : i + room]) for i in range(0, len(seeds), room)] or [[]]
    for offset, group in enumerate(groups):
        alphas = {
            layer: np.repeat(batch.alpha[None], len(group) + 1, axis=0)
            for layer, batch in telemetry.items()
        }
        for row, (layer, seed_id) in enumerate(group, start=1):
            alphas[layer][row, seed_id] = 1.0 - np.ceil(telemetry[layer].alpha[seed_id])
        number = first_number + offset
        yield group, EvaluationRequest(number, "gate", len(group) + 1, alphas if group else {})


def in_the_output(telemetry: Mapping[str, TelemetryBatch]) -> list[Seed]:
    """Every seed whose alpha is above 0."""
    return [
        (layer, seed_id)
        for layer, batch in telemetry.items()
        for seed_id in np.flatnonzero(batch.alpha > 0).tolist()
    ]


def measurements(
    telemetry: Mapping[str, TelemetryBatch], group: Sequence[Seed], result: Evaluation
) -> dict[Seed, Measurement]:
    """What one evaluated request says of each of its seeds."""
    found: dict[Seed, Measurement] = {}
    for row, (layer, seed_id) in enumerate(group, start=1):
        with_seed = telemetry[layer].alpha[seed_id] > 0
        baseline, flipped = float(result.loss[0]), float(result.loss[row])
        on, off = (baseline, flipped) if with_seed else (flipped, baseline)
        gain = result.change[row] if with_seed else -result.change[row]
        low = result.change_low[row] if with_seed else -result.change_high[row]
        scale = abs(off) or math.nan
        found[layer, seed_id] = Measurement(on, off, float(gain) / scale, float(low) / scale)
    return found


def stability(gate_losses: Sequence[float]) -> float | None:
    """1 - min(1, std / |mean|) of the last five gate losses; None until there are five."""
    last = np.asarray(gate_losses[-STABILITY_WINDOW:], dtype=np.float64)
    if len(last) < STABILITY_WINDOW or not np.isfinite(last).all() or last.mean() == 0:
        return None
    return float(1.0 - min(1.0, last.std() / abs(last.mean())))


def variance(values: Sequence[float]) -> float:
    """Variance of the last five values; NaN until there are five."""
    last = np.asarray(values[-STABILITY_WINDOW:], dtype=np.float64)
    return float(last.var()) if len(last) == STABILITY_WINDOW else math.nan


def metrics_batch(
    telemetry: TelemetryBatch,
    measured: Mapping[int, Measurement],
    accuracy: float | None,
    steadiness: float | None,
    variances: tuple[float, float] = (math.nan, math.nan),
) -> MetricsBatch:
    """The measured seeds' rows for the state tensor: loss, accuracy, stability, efficiency.

    `variances` are those of the last gate losses and accuracies.
    """
    ids = np.array(sorted(measured), dtype=np.int64)
    rows = np.full((len(ids), 4), np.nan, dtype=np.float32)
    for row, seed_id in enumerate(ids.tolist()):
        found = measured[seed_id]
        efficiency = max(0.0, found.delta) / telemetry.parameter_share
        rows[row] = (found.loss_on, _or_nan(accuracy), _or_nan(steadiness), efficiency)
    valid = (np.isfinite(rows) << np.arange(4)).sum(axis=1).astype(np.uint8)
    score: NDArray[np.float32] = np.array(
        [measured[i].delta for i in ids.tolist()], dtype=np.float32
    )
    return MetricsBatch(telemetry.layer_id, ids, np.nan_to_num(rows), valid, score, *variances)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
