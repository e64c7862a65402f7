"""The default policy: plant where the gradient is large, move on when a gate may open.

It proposes; LifecycleManager decides. What a seed tries is a table over its state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esper_ray.events.messages import TelemetryBatch
from esper_ray.grafting import STRATEGIES
from esper_ray.lifecycle import Cause, ExtendedLifecycle, Requests
from esper_ray.policy.base import Command, LayerReport, PolicySettings

_S = ExtendedLifecycle


class Plan(NamedTuple):
    """What a seed in one state asks for: `first`; if refused `second`, or `late` after a timeout.

    One that fails asks for `failed` instead.
    """

    first: ExtendedLifecycle
    second: ExtendedLifecycle | None = None
    late: ExtendedLifecycle | None = None
    failed: ExtendedLifecycle | None = None


PLANS: Final[Mapping[ExtendedLifecycle, Plan]] = {
    _S.GERMINATED: Plan(_S.TRAINING),
    _S.TRAINING: Plan(_S.GRAFTING, late=_S.CULLED, failed=_S.CULLED),
    _S.GRAFTING: Plan(_S.STABILIZATION, late=_S.ROLLED_BACK, failed=_S.ROLLED_BACK),
    _S.STABILIZATION: Plan(_S.EVALUATING, failed=_S.ROLLED_BACK),
    _S.EVALUATING: Plan(_S.FINE_TUNING, second=_S.CULLED, failed=_S.ROLLED_BACK),
    _S.FINE_TUNING: Plan(_S.FOSSILIZED, late=_S.CULLED, failed=_S.ROLLED_BACK),
}
"""Every state that the policy moves seeds out of by itself, DORMANT apart."""

_GROWING: Final = tuple(PLANS)
_IN_OUTPUT: Final = (_S.GRAFTING, _S.STABILIZATION, _S.EVALUATING, _S.FINE_TUNING)
_JUDGED: Final = (_S.TRAINING, _S.EVALUATING, _S.FINE_TUNING)


def _column(field: str) -> NDArray[np.int32]:
    """(11,) what `field` of the plan of each state says, -1 for nothing."""
    table = np.full(len(_S), -1, dtype=np.int32)
    for state, plan in PLANS.items():
        target = getattr(plan, field)
        table[state] = -1 if target is None else target
    return table


_FIRST, _SECOND, _LATE, _FAILED = map(_column, Plan._fields)


class Moves(NamedTuple):
    """Targets, -1 for none, and causes; (rows,) each."""

    target: NDArray[np.int32]
    cause: NDArray[np.int32]


def judged_rows(
    telemetry: TelemetryBatch,
    minimum_epochs: Mapping[ExtendedLifecycle, int],
    settings: PolicySettings,
) -> NDArray[np.int64]:
    """Ids of the seeds whose counterfactual is due: old enough to leave a state that is judged,
    or in GRAFTING under a strategy that reads what they gain."""
    due = np.zeros(len(telemetry.state), dtype=np.bool_)
    for state in _JUDGED:
        if state is _S.TRAINING and settings.objective == "reconstruction":
            continue  # its gate reads the local loss only
        old = telemetry.epochs_in_state >= minimum_epochs.get(state, 0)
        due |= (telemetry.state == state) & old
    readers = [n for n, kind in STRATEGIES.items() if "performance_delta" in kind.reads]
    reads = settings.strategies_switch | np.isin(telemetry.strategy, readers)
    due |= (telemetry.state == _S.GRAFTING) & reads
    return np.flatnonzero(due)


def propose(
    report: LayerReport, settings: PolicySettings, commands: Mapping[int, Command]
) -> tuple[Requests, Moves]:
    """The first move of each seed that may make one, and what to try where that is refused."""
    telemetry = report.telemetry
    wanted = np.isin(telemetry.state, _GROWING)
    wanted[_to_plant(report, settings)] = True
    asked = np.array(sorted(commands), dtype=np.int64)
    if (asked < 0).any():
        raise IndexError(f"layer {telemetry.layer_id!r} has no seed {asked[0]}")
    wanted[asked] = True
    rows = np.flatnonzero(wanted)
    first, second = _plan(report, rows, settings)
    places = np.searchsorted(rows, asked)
    first.target[places] = [commands[seed].target for seed in asked.tolist()]
    first.cause[places] = [commands[seed].cause for seed in asked.tolist()]
    second.target[places] = -1
    requests = Requests(
        layer_id=telemetry.layer_id,
        seed_ids=rows,
        generation=telemetry.generation[rows],
        source=telemetry.state[rows],
        target=first.target,
        cause=first.cause,
        epochs_in_state=telemetry.epochs_in_state[rows],
        error_count=telemetry.error_count[rows],
        metrics=_metrics(report, rows),
        objective=settings.objective,
    )
    return requests, second


def _plan(
    report: LayerReport, rows: NDArray[np.int64], settings: PolicySettings
) -> tuple[Moves, Moves]:
    telemetry = report.telemetry
    state = telemetry.state[rows]
    failing = (telemetry.error_count[rows] > settings.error_limit) & (state != _S.EVALUATING)
    guilty = [seed for seed, found in report.measured.items() if found.guilty]
    failing |= np.isin(rows, guilty) & np.isin(state, _IN_OUTPUT)
    failing &= _FAILED[state] >= 0
    late = telemetry.epochs_in_state[rows] >= _timeouts(settings)[state]
    late &= (state != _S.GRAFTING) | (telemetry.alpha[rows] != 1)  # blended in time: it may wait
    planted = state == _S.DORMANT
    target = np.where(planted, np.int32(_S.GERMINATED), _FIRST[state])
    first = Moves(
        np.where(failing, _FAILED[state], target),
        np.where(failing, np.int32(Cause.ERROR), np.int32(Cause.POLICY)),
    )
    overdue = late & (_LATE[state] >= 0)
    second = np.where(overdue, _LATE[state], _SECOND[state])
    cause = np.where(overdue, np.int32(Cause.TIMEOUT), np.int32(Cause.POLICY))
    return first, Moves(np.where(failing, np.int32(-1), second), cause)


def in_output(telemetry: TelemetryBatch) -> list[int]:
    """Seeds that the output hears and that may be retired."""
    return np.flatnonzero((telemetry.alpha > 0) & (_FAILED[telemetry.state] >= 0)).tolist()


def retiring(
    telemetry: TelemetryBatch, seed_ids: NDArray[np.int64], settings: PolicySettings
) -> Requests:
    """Requests to retire seeds that have failed, by the move of their states that PLANS names."""
    state = telemetry.state[seed_ids]
    return Requests(
        layer_id=telemetry.layer_id,
        seed_ids=seed_ids,
        generation=telemetry.generation[seed_ids],
        source=state,
        target=_FAILED[state],
        cause=np.full(len(seed_ids), Cause.ERROR, dtype=np.int32),
        epochs_in_state=telemetry.epochs_in_state[seed_ids],
        error_count=telemetry.error_count[seed_ids],
        metrics={},
        objective=settings.objective,
    )


def _timeouts(settings: PolicySettings) -> NDArray[np.int64]:
    limits = np.full(len(_S), np.iinfo(np.int64).max)
    limits[_S.TRAINING] = settings.training_timeout
    limits[_S.GRAFTING] = 4 * settings.ramp_epochs
    limits[_S.FINE_TUNING] = settings.fine_tuning_timeout
    return limits


def _to_plant(report: LayerReport, settings: PolicySettings) -> NDArray[np.int64]:
    """Dormant seeds to germinate, those with the largest task gradient first."""
    telemetry = report.telemetry
    room = settings.max_growing - int(np.isin(telemetry.state, _GROWING).sum())
    if telemetry.epoch < settings.germinate_after or room <= 0:
        return np.empty(0, dtype=np.int64)
    dormant = np.flatnonzero(telemetry.state == _S.DORMANT)
    strength = np.nan_to_num(telemetry.chunk_gradient[dormant], nan=-1.0)
    return dormant[np.argsort(-strength, kind="stable")[:room]]


def _metrics(report: LayerReport, rows: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """What was measured of some seeds, by the names that gates use; NaN = not measured."""
    telemetry = report.telemetry
    wide = {
        "alpha": telemetry.alpha,
        "local_loss": telemetry.local_loss,
        "reconstruction_loss": telemetry.local_loss,
        "delta_ratio": telemetry.delta_ratio,
    }
    values = {name: column[rows].astype(np.float64) for name, column in wide.items()}
    values["epochs_since_end"] = telemetry.epoch - telemetry.last_change[rows].astype(np.float64)
    steady = math.nan if report.stability is None else report.stability
    values["stability_score"] = values["final_stability"] = np.full(len(rows), steady)
    measured = np.full((3, len(telemetry.state)), np.nan)
    for seed_id, found in report.measured.items():
        ratio = found.loss_on / found.loss_off if found.loss_off > 0 else math.nan
        measured[:, seed_id] = (ratio, found.delta, found.delta_low)
    ratio, delta, low = measured[:, rows]
    values["alpha_one_loss_ratio"] = ratio
    for name in ("performance_delta", "total_improvement"):
        values[name], values[f"{name}_low"] = delta, low
    return values
