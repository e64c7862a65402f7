"""The default policy: plant where the gradient is large, move on when a gate may open.

It proposes; LifecycleManager decides. Work grows with the seeds that may move, not with the layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from esper_ray.events.messages import TelemetryBatch
from esper_ray.lifecycle import (
    Cause,
    ExtendedLifecycle,
    TransitionContext,
    TransitionRequest,
)
from esper_ray.policy.base import LayerReport, PolicySettings

_S = ExtendedLifecycle
_GROWING = (
    _S.GERMINATED,
    _S.TRAINING,
    _S.GRAFTING,
    _S.STABILIZATION,
    _S.EVALUATING,
    _S.FINE_TUNING,
)
_JUDGED = (_S.TRAINING, _S.EVALUATING, _S.FINE_TUNING)

Move = tuple[ExtendedLifecycle, Cause]


def judged_rows(
    telemetry: TelemetryBatch,
    minimum_epochs: Mapping[ExtendedLifecycle, int],
    settings: PolicySettings,
) -> NDArray[np.int64]:
    """Ids of the seeds whose counterfactual is due: old enough to leave a state that is judged."""
    due = np.zeros(len(telemetry.state), dtype=np.bool_)
    for state in _JUDGED:
        if state is _S.TRAINING and settings.objective == "reconstruction":
            continue  # its gate reads the local loss only
        old = telemetry.epochs_in_state >= minimum_epochs.get(state, 0)
        due |= (telemetry.state == state) & old
    return np.flatnonzero(due)


def propose(report: LayerReport, settings: PolicySettings) -> Iterator[list[TransitionRequest]]:
    """For each seed that may move, the moves to try in order; the first accepted one is made."""
    telemetry = report.telemetry
    for seed_id in np.flatnonzero(np.isin(telemetry.state, _GROWING)).tolist():
        moves = _moves(report, seed_id, settings)
        if moves:
            yield [_request(report, seed_id, move, settings) for move in moves]
    for seed_id in _to_plant(report, settings):
        yield [_request(report, seed_id, (_S.GERMINATED, Cause.POLICY), settings)]


def _to_plant(report: LayerReport, settings: PolicySettings) -> list[int]:
    """Dormant seeds to germinate, those with the largest task gradient first."""
    telemetry = report.telemetry
    room = settings.max_growing - int(np.isin(telemetry.state, _GROWING).sum())
    if telemetry.epoch < settings.germinate_after or room <= 0:
        return []
    dormant = np.flatnonzero(telemetry.state == _S.DORMANT)
    strength = np.nan_to_num(telemetry.chunk_gradient[dormant], nan=-1.0)
    order = np.argsort(-strength, kind="stable")
    return [int(i) for i in dormant[order][:room]]


def _moves(report: LayerReport, seed_id: int, settings: PolicySettings) -> list[Move]:
    telemetry = report.telemetry
    state = _S(int(telemetry.state[seed_id]))
    epochs = int(telemetry.epochs_in_state[seed_id])
    failing = int(telemetry.error_count[seed_id]) > settings.error_limit
    broken = not math.isfinite(report.gate_loss)
    if state is _S.GERMINATED:
        return [(_S.TRAINING, Cause.POLICY)]
    if state is _S.TRAINING:
        late = epochs >= settings.training_timeout
        ends: list[Move] = [(_S.CULLED, Cause.ERROR)] if failing else []
        ends += [(_S.CULLED, Cause.TIMEOUT)] if late else []
        return ends if failing else [(_S.GRAFTING, Cause.POLICY), *ends]
    if broken or failing:
        return [(_S.ROLLED_BACK, Cause.ERROR)]
    if state is _S.GRAFTING:
        late = epochs >= 4 * settings.ramp_epochs
        return [(_S.STABILIZATION, Cause.POLICY)] + [(_S.ROLLED_BACK, Cause.TIMEOUT)] * late
    if state is _S.STABILIZATION:
        return [(_S.EVALUATING, Cause.POLICY)]
    if state is _S.EVALUATING:
        return [(_S.FINE_TUNING, Cause.POLICY), (_S.CULLED, Cause.POLICY)]
    late = epochs >= settings.fine_tuning_timeout
    return [(_S.FOSSILIZED, Cause.POLICY)] + [(_S.CULLED, Cause.TIMEOUT)] * late


def _request(
    report: LayerReport, seed_id: int, move: Move, settings: PolicySettings
) -> TransitionRequest:
    telemetry = report.telemetry
    context = TransitionContext(
        seed_id=seed_id,
        current_state=_S(int(telemetry.state[seed_id])),
        target_state=move[0],
        epochs_in_state=int(telemetry.epochs_in_state[seed_id]),
        performance_metrics=_metrics(report, seed_id),
        error_count=int(telemetry.error_count[seed_id]),
        metadata={"objective": settings.objective, "layer_id": telemetry.layer_id},
    )
    return TransitionRequest(context, int(telemetry.generation[seed_id]), move[1])


def _metrics(report: LayerReport, seed_id: int) -> dict[str, float]:
    """What was measured of one seed, by the names that the gates use."""
    telemetry = report.telemetry
    values: dict[str, float] = {
        "alpha": float(telemetry.alpha[seed_id]),
        "local_loss": float(telemetry.local_loss[seed_id]),
        "reconstruction_loss": float(telemetry.local_loss[seed_id]),
        "delta_ratio": float(telemetry.delta_ratio[seed_id]),
    }
    if report.stability is not None:
        values["stability_score"] = values["final_stability"] = report.stability
    found = report.measured.get(seed_id)
    if found is None:
        return values
    if found.loss_off != 0:
        values["alpha_one_loss_ratio"] = found.loss_on / found.loss_off
    for name in ("performance_delta", "total_improvement"):
        values[name], values[f"{name}_low"] = found.delta, found.delta_low
    return values
