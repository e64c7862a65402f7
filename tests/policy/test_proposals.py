"""What a proposal carries: numbers under the gates' names, and what a person asked instead."""

from __future__ import annotations

import math

import numpy as np
import pytest

from esper_ray.lifecycle import ACTIONS, GATES, RECONSTRUCTION, Cause, move_of
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.policy import Command, LayerReport, Measurement, PolicySettings, propose
from tests.policy.reports import (
    GUILTY,
    HELPFUL,
    NEVER_PLANT,
    VAGUE,
    floats,
    ints,
    moves_of,
    report,
)

MEASURED = {
    "alpha_one_loss_ratio",
    "performance_delta",
    "performance_delta_low",
    "total_improvement",
    "total_improvement_low",
}


def metrics_of(seen: LayerReport, row: int = 0) -> dict[str, float]:
    asked, _ = propose(seen, NEVER_PLANT, {})
    return {name: float(values[row]) for name, values in asked.metrics.items()}


def known(metrics: dict[str, float]) -> set[str]:
    return {name for name, value in metrics.items() if math.isfinite(value)}


def test_a_request_carries_what_was_measured_under_the_gates_names() -> None:
    seen = report(
        [S.EVALUATING],
        31,
        measured={0: HELPFUL},
        epoch=40,
        last_change=ints(9),
        local_loss=floats(0.5),
        delta_ratio=floats(0.25),
    )
    assert metrics_of(seen) == {
        "alpha": 1.0,
        "local_loss": 0.5,
        "reconstruction_loss": 0.5,
        "delta_ratio": 0.25,
        "epochs_since_end": 31.0,
        "stability_score": 0.97,
        "final_stability": 0.97,
        "alpha_one_loss_ratio": 0.95,
        "performance_delta": 0.05,
        "performance_delta_low": 0.04,
        "total_improvement": 0.05,
        "total_improvement_low": 0.04,
    }


def test_metrics_are_columns_of_float64_with_a_row_per_request() -> None:
    asked, _ = propose(report([S.TRAINING, S.DORMANT, S.GRAFTING]), NEVER_PLANT, {})
    assert {values.shape for values in asked.metrics.values()} == {(2,)}
    assert {values.dtype for values in asked.metrics.values()} == {np.dtype(np.float64)}


def test_every_name_that_a_gate_reads_is_carried_or_counted_apart() -> None:
    carried = set(metrics_of(report([S.TRAINING])))
    read = {c.metric for gate in [*GATES.values(), RECONSTRUCTION] for c in gate.clauses()}
    assert read - carried == {"error_rate", "error_count", "epochs_in_state"}


def test_lesson_26_what_was_not_measured_is_not_a_number() -> None:
    seen = report([S.EVALUATING], stability=None)
    assert known(metrics_of(seen)) == {"alpha", "epochs_since_end"}


def test_each_seed_carries_its_own_measurement() -> None:
    seen = report([S.DORMANT, S.EVALUATING, S.EVALUATING, S.TRAINING], measured={2: VAGUE})
    assert not known(metrics_of(seen, 0)) & MEASURED
    assert known(metrics_of(seen, 1)) >= MEASURED
    assert metrics_of(seen, 1)["performance_delta_low"] == -0.01
    assert not known(metrics_of(seen, 2)) & MEASURED


@pytest.mark.parametrize("off", [0.0, -1.0])
@pytest.mark.parametrize("on", [0.0, 1.0, -2.0])
def test_lesson_26_without_a_positive_loss_no_ratio_is_measured(on: float, off: float) -> None:
    """1.0 over -1.0 is no ratio of at most 1.01: a seed that doubles such a loss must not pass."""
    odd = Measurement(loss_on=on, loss_off=off, delta=math.nan, delta_low=math.nan)
    ratio = metrics_of(report([S.TRAINING], measured={0: odd}))["alpha_one_loss_ratio"]
    assert math.isnan(ratio)


def test_a_request_names_state_epochs_errors_generation_and_objective() -> None:
    seen = report(
        [S.DORMANT, S.TRAINING],
        12,
        layer_id="model.0",
        error_count=ints(0, 3),
        generation=np.array([0, 4], dtype=np.int16),
    )
    settings = PolicySettings(objective="reconstruction", germinate_after=10**6)
    asked, _ = propose(seen, settings, {})
    assert (asked.layer_id, asked.objective) == ("model.0", "reconstruction")
    assert asked.seed_ids.tolist() == [1]
    assert asked.generation.tolist() == [4]
    assert asked.source.tolist() == [S.TRAINING]
    assert asked.epochs_in_state.tolist() == [12]
    assert asked.error_count.tolist() == [3]
    assert asked.generation.dtype == np.int16
    assert asked.target.dtype == asked.cause.dtype == np.int32


def test_a_layer_where_nothing_may_move_proposes_nothing() -> None:
    asked, second = propose(report([S.DORMANT, S.FOSSILIZED]), NEVER_PLANT, {})
    assert len(asked) == len(second.target) == len(second.cause) == 0


# ---- what a person asked -----------------------------------------------------------------------


@pytest.mark.parametrize("action", list(ACTIONS))
@pytest.mark.parametrize("state", list(S))
def test_a_command_is_the_one_move_of_its_seed(state: S, action: str) -> None:
    command = Command(1, *move_of(action))
    seen = report([S.FOSSILIZED, state, S.GRAFTING], 999, measured={1: GUILTY, 2: GUILTY})
    assert moves_of(seen, commands={1: command}) == {
        1: [move_of(action)],
        2: [(S.ROLLED_BACK, Cause.ERROR)],
    }


def test_commands_find_their_seeds_in_whatever_order_they_came() -> None:
    commands = {
        3: Command(2, S.CULLED, Cause.USER),
        0: Command(1, S.GERMINATED, Cause.USER),
        2: Command(3, S.DORMANT, Cause.REPLANT),
    }
    seen = report([S.DORMANT, S.TRAINING, S.CULLED, S.TRAINING, S.DORMANT])
    assert moves_of(seen, commands=commands) == {
        0: [(S.GERMINATED, Cause.USER)],
        1: [(S.GRAFTING, Cause.POLICY)],
        2: [(S.DORMANT, Cause.REPLANT)],
        3: [(S.CULLED, Cause.USER)],
    }


def test_the_policy_does_not_replant_by_itself() -> None:
    settings = PolicySettings(germinate_after=0)
    assert moves_of(report([S.CULLED, S.CANCELLED, S.ROLLED_BACK], 999), settings) == {}


@pytest.mark.parametrize("seed", [-1, -2, 2, 99])
def test_lesson_12_a_command_for_a_seed_that_does_not_exist_is_an_error(seed: int) -> None:
    command = Command(1, S.CANCELLED, Cause.USER)
    with pytest.raises(IndexError, match=str(seed)):
        propose(report([S.TRAINING, S.TRAINING]), NEVER_PLANT, {seed: command})
