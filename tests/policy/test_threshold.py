"""What the default policy proposes, state by state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from esper_ray.errors import ConfigError
from esper_ray.lifecycle import MINIMUM_EPOCHS, Cause
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.policy import LayerReport, Measurement, PolicySettings, judged_rows, propose
from tests.builders import telemetry

HELPFUL = Measurement(loss_on=1.9, loss_off=2.0, delta=0.05, delta_low=0.04)
Moves = list[tuple[S, Cause]]


def report(
    states: Sequence[S],
    epochs: int = 0,
    *,
    gate_loss: float = 2.0,
    stability: float | None = 0.97,
    measured: Mapping[int, Measurement] | None = None,
    **columns: Any,
) -> LayerReport:
    seen = telemetry(states, epochs, **columns)
    return LayerReport(seen, gate_loss, stability, measured or {})


def moves_of(seen: LayerReport, settings: PolicySettings | None = None) -> dict[int, Moves]:
    return {
        asked[0].context.seed_id: [(r.context.target_state, r.cause) for r in asked]
        for asked in propose(seen, settings or PolicySettings(germinate_after=10**6))
    }


P, E, T = Cause.POLICY, Cause.ERROR, Cause.TIMEOUT
TABLE: list[tuple[S, int, int, float, Moves]] = [
    # state, epochs, errors, gate loss -> moves to try in order
    (S.GERMINATED, 0, 0, 2.0, [(S.TRAINING, P)]),
    (S.TRAINING, 299, 5, 2.0, [(S.GRAFTING, P)]),
    (S.TRAINING, 300, 5, 2.0, [(S.GRAFTING, P), (S.CULLED, T)]),
    (S.TRAINING, 0, 6, 2.0, [(S.CULLED, E)]),
    (S.TRAINING, 300, 6, 2.0, [(S.CULLED, E), (S.CULLED, T)]),
    (S.TRAINING, 0, 0, math.nan, [(S.GRAFTING, P)]),
    (S.GRAFTING, 199, 5, 2.0, [(S.STABILIZATION, P)]),
    (S.GRAFTING, 200, 0, 2.0, [(S.STABILIZATION, P), (S.ROLLED_BACK, T)]),
    (S.GRAFTING, 0, 6, 2.0, [(S.ROLLED_BACK, E)]),
    (S.STABILIZATION, 0, 5, 2.0, [(S.EVALUATING, P)]),
    (S.STABILIZATION, 0, 6, 2.0, [(S.ROLLED_BACK, E)]),
    (S.EVALUATING, 0, 5, 2.0, [(S.FINE_TUNING, P), (S.CULLED, P)]),
    (S.EVALUATING, 0, 6, 2.0, [(S.ROLLED_BACK, E)]),
    (S.FINE_TUNING, 149, 5, 2.0, [(S.FOSSILIZED, P)]),
    (S.FINE_TUNING, 150, 0, 2.0, [(S.FOSSILIZED, P), (S.CULLED, T)]),
    (S.FINE_TUNING, 0, 6, 2.0, [(S.ROLLED_BACK, E)]),
]


@pytest.mark.parametrize(("state", "epochs", "errors", "gate_loss", "expected"), TABLE)
def test_each_state_asks_for_its_next_ones(
    state: S, epochs: int, errors: int, gate_loss: float, expected: Moves
) -> None:
    seen = report(
        [S.DORMANT, state],
        epochs,
        gate_loss=gate_loss,
        error_count=np.array([0, errors], dtype=np.int32),
    )
    assert moves_of(seen) == {1: expected}


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_gate_loss_that_is_not_a_number_rolls_back_what_is_blended_and_nothing_else(
    loss: float,
) -> None:
    blended = {S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING}
    moves = moves_of(report(list(S), gate_loss=loss))
    rolled = {S(seed) for seed, m in moves.items() if m == [(S.ROLLED_BACK, E)]}
    assert rolled == blended
    assert set(moves) - blended == {S.GERMINATED, S.TRAINING}


def test_lesson_23_a_failing_seed_in_grafting_rolls_back() -> None:
    errors = np.array([6], dtype=np.int32)
    assert moves_of(report([S.GRAFTING], error_count=errors)) == {0: [(S.ROLLED_BACK, E)]}


def test_terminal_seeds_ask_for_nothing() -> None:
    terminal = [S.FOSSILIZED, S.CULLED, S.CANCELLED, S.ROLLED_BACK]
    assert moves_of(report(terminal, 1_000, gate_loss=math.nan)) == {}


@pytest.mark.parametrize(
    ("name", "state", "epochs"),
    [
        ("training_timeout", S.TRAINING, 7),
        ("fine_tuning_timeout", S.FINE_TUNING, 7),
        ("ramp_epochs", S.GRAFTING, 28),
    ],
)
def test_timeouts_are_settings(name: str, state: S, epochs: int) -> None:
    settings = PolicySettings(germinate_after=10**6, **{name: 7})  # type: ignore[arg-type]
    assert len(moves_of(report([state], epochs - 1), settings)[0]) == 1
    assert moves_of(report([state], epochs), settings)[0][1][1] is Cause.TIMEOUT


# ---- planting --------------------------------------------------------------------------------


def planted(
    states: Sequence[S], gradient: Sequence[float], room: int = 100, epoch: int = 100
) -> list[int]:
    seen = report(states, epoch=epoch, chunk_gradient=np.array(gradient, dtype=np.float32))
    settings = PolicySettings(max_growing=room)
    return [
        asked[0].context.seed_id
        for asked in propose(seen, settings)
        if asked[0].context.target_state is S.GERMINATED
    ]


def test_dormant_seeds_are_planted_by_gradient_and_ties_by_number() -> None:
    assert planted([S.DORMANT] * 5, [0.2, 0.5, 0.2, 0.9, 0.5]) == [3, 1, 4, 0, 2]


def test_lesson_26_a_seed_whose_gradient_was_not_measured_comes_last() -> None:
    assert planted([S.DORMANT] * 3, [math.nan, 0.0, 0.1]) == [2, 1, 0]


def test_nothing_is_planted_before_its_time() -> None:
    assert planted([S.DORMANT], [1.0], epoch=99) == []
    assert planted([S.DORMANT], [1.0], epoch=100) == [0]


@pytest.mark.parametrize(("room", "count"), [(1, 0), (4, 0), (5, 1), (6, 2), (99, 3)])
def test_growing_seeds_use_up_the_budget(room: int, count: int) -> None:
    growing = [S.GERMINATED, S.TRAINING, S.GRAFTING, S.EVALUATING]
    ended = [S.FOSSILIZED, S.CULLED, S.ROLLED_BACK]
    states = [*growing, *ended, S.DORMANT, S.DORMANT, S.DORMANT]
    assert planted(states, [0.0] * 10, room) == [7, 8, 9][:count]


@pytest.mark.parametrize("room", [0, -1])
def test_a_budget_without_room_is_refused(room: int) -> None:
    with pytest.raises(ConfigError, match=f"max_growing must be at least 1, got {room}"):
        PolicySettings(max_growing=room)


# ---- what a request carries ------------------------------------------------------------------


def metrics_of(seen: LayerReport, settings: PolicySettings | None = None) -> Mapping[str, float]:
    asked = next(propose(seen, settings or PolicySettings(germinate_after=10**6)))
    return asked[0].context.performance_metrics


def test_a_request_carries_what_was_measured_under_the_gates_names() -> None:
    seen = report(
        [S.EVALUATING],
        31,
        measured={0: HELPFUL},
        local_loss=np.array([0.5], dtype=np.float32),
        delta_ratio=np.array([0.25], dtype=np.float32),
    )
    assert dict(metrics_of(seen)) == {
        "alpha": 1.0,
        "local_loss": 0.5,
        "reconstruction_loss": 0.5,
        "delta_ratio": 0.25,
        "stability_score": 0.97,
        "final_stability": 0.97,
        "alpha_one_loss_ratio": 0.95,
        "performance_delta": 0.05,
        "performance_delta_low": 0.04,
        "total_improvement": 0.05,
        "total_improvement_low": 0.04,
    }


def test_lesson_26_what_was_not_measured_is_absent() -> None:
    names = set(metrics_of(report([S.EVALUATING], stability=None)))
    assert names == {"alpha", "local_loss", "reconstruction_loss", "delta_ratio"}


def test_a_loss_of_zero_without_the_seed_leaves_the_ratio_unmeasured() -> None:
    perfect = Measurement(loss_on=0.0, loss_off=0.0, delta=math.nan, delta_low=math.nan)
    assert "alpha_one_loss_ratio" not in metrics_of(report([S.TRAINING], measured={0: perfect}))


def test_a_request_names_state_epochs_errors_generation_and_objective() -> None:
    seen = report(
        [S.DORMANT, S.TRAINING],
        12,
        error_count=np.array([0, 3], dtype=np.int32),
        generation=np.array([0, 4], dtype=np.int16),
    )
    settings = PolicySettings(objective="reconstruction", germinate_after=10**6)
    [[asked]] = propose(seen, settings)
    context = asked.context
    assert asked.generation == 4
    assert (context.seed_id, context.current_state, context.epochs_in_state) == (1, S.TRAINING, 12)
    assert context.error_count == 3
    assert context.metadata == {"objective": "reconstruction", "layer_id": "layer"}


# ---- whose counterfactual is due -------------------------------------------------------------


def test_seeds_old_enough_in_a_judged_state_are_measured() -> None:
    young = telemetry(list(S), [MINIMUM_EPOCHS.get(s, 0) - 1 for s in S])
    old = telemetry(list(S), [MINIMUM_EPOCHS.get(s, 0) for s in S])
    assert judged_rows(young, MINIMUM_EPOCHS, PolicySettings()).tolist() == []
    judged = [S.TRAINING, S.EVALUATING, S.FINE_TUNING]
    assert judged_rows(old, MINIMUM_EPOCHS, PolicySettings()).tolist() == judged


def test_reconstruction_needs_no_counterfactual_in_training() -> None:
    old, settings = telemetry(list(S), 1_000), PolicySettings(objective="reconstruction")
    due = judged_rows(old, MINIMUM_EPOCHS, settings)
    assert due.tolist() == [S.EVALUATING, S.FINE_TUNING]
