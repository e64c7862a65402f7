"""What a person is told of one row: gate, inputs, thresholds and a sentence."""

from __future__ import annotations

import math

import numpy as np
import pytest

from esper_ray.lifecycle import REASONS, Cause, LifecycleManager, Refusal
from esper_ray.lifecycle import ExtendedLifecycle as S
from tests.lifecycle.rows import OPEN, Row, explained, judge


def test_every_refusal_has_a_sentence_of_its_own() -> None:
    assert set(REASONS) == set(Refusal)
    assert len(set(REASONS.values())) == len(Refusal)
    assert REASONS[Refusal.NONE] == "accepted"


def test_refusals_keep_the_numbers_that_receipts_hold() -> None:
    assert [int(code) for code in Refusal] == list(range(len(Refusal)))


@pytest.mark.parametrize(
    ("row", "gate", "inputs", "verdict"),
    [
        (Row(S.GRAFTING, S.STABILIZATION), "fully_blended", {"alpha": 1.0}, "accepted"),
        (
            Row(S.GRAFTING, S.STABILIZATION, metrics={"alpha": 0.5}),
            "fully_blended",
            {"alpha": 0.5},
            "alpha is 0.5, and exactly 1 is needed",
        ),
        (
            Row(S.GRAFTING, S.STABILIZATION, epochs=3),
            "fully_blended",
            {"alpha": 1.0},
            "GRAFTING lasts at least 50 epochs, this seed has spent 3",
        ),
        (
            Row(S.EVALUATING, S.CULLED, 40, errors=2, metrics={"performance_delta": 0.01}),
            "negative_evaluation",
            {
                "performance_delta": 0.01,
                "error_rate": math.nan,
                "error_count": 2.0,
                "epochs_in_state": 40.0,
                "performance_delta_low": 0.01,
                "stability_score": math.nan,
            },
            "the evaluation is neither negative nor inconclusive for long enough",
        ),
        (
            Row(S.FINE_TUNING, S.FOSSILIZED, metrics={**OPEN, "total_improvement_low": -0.001}),
            "improvement",
            {"total_improvement": 0.1, "total_improvement_low": -0.001, "final_stability": 0.99},
            "the lower bound of total_improvement is -0.001, and > 0 is needed",
        ),
    ],
)
def test_a_gated_row_is_told_with_gate_and_inputs(
    row: Row, gate: str, inputs: dict[str, float], verdict: str
) -> None:
    told = judge(row).explain(0)
    assert told.gate == gate
    assert told.inputs == pytest.approx(inputs, nan_ok=True)
    assert set(told.thresholds) == set(inputs)
    assert told.verdict == verdict


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (Row(S.DORMANT, S.GERMINATED), "accepted"),
        (Row(S.DORMANT, S.TRAINING), "the move is not in the table"),
        (Row(S.FOSSILIZED, S.CULLED), "the state is terminal"),
        (Row(99, S.CULLED), "no state has that number"),
        (Row(S.TRAINING, -1), "no state has that number"),
        (Row(S.TRAINING, S.CULLED, 7), "TRAINING lasts at least 100 epochs, this seed has spent 7"),
        (Row(S.CULLED, S.DORMANT, cause=Cause.REPLANT), "replanting is off"),
    ],
)
def test_a_row_without_a_gate_is_told_by_its_verdict_alone(row: Row, verdict: str) -> None:
    told = judge(row).explain(0)
    assert (told.gate, told.inputs, told.thresholds) == ("", {}, {})
    assert told.verdict == verdict


def test_the_objective_decides_which_gate_is_told() -> None:
    row = Row(S.TRAINING, S.GRAFTING, metrics={"reconstruction_loss": 0.5})
    told = judge(row, objective="reconstruction").explain(0)
    assert told.gate == "reconstruction"
    assert told.verdict == "reconstruction_loss is 0.5, and <= 0.01 is needed"
    assert judge(row).explain(0).verdict == (
        "local_loss was not measured, and a finite value is needed"
    )


def test_lesson_26_what_was_not_measured_is_told_as_such() -> None:
    helps = (S.EVALUATING, S.FINE_TUNING)
    assert explained(Row(*helps, metrics={**OPEN, "performance_delta": math.nan})) == (
        "performance_delta was not measured, and a finite value is needed"
    )
    assert explained(Row(*helps, metrics={**OPEN, "performance_delta_low": math.inf})) == (
        "performance_delta_low was not measured, and > 0 is needed"
    )
    assert explained(Row(*helps, metrics={**OPEN, "stability_score": math.nan})) == (
        "stability_score was not measured, and >= 0.8 is needed"
    )


def test_the_mean_is_told_as_the_bound_where_no_bound_was_measured() -> None:
    told = judge(Row(S.EVALUATING, S.FINE_TUNING, metrics={"performance_delta": 0.2})).explain(0)
    assert told.inputs["performance_delta_low"] == 0.2


def test_thresholds_and_minima_are_told_as_configured() -> None:
    manager = LifecycleManager(minimum_epochs={S.GRAFTING: 7})
    assert explained(Row(S.GRAFTING, S.STABILIZATION, 6), manager) == (
        "GRAFTING lasts at least 7 epochs, this seed has spent 6"
    )


def test_a_refusal_after_judging_is_told_in_its_place() -> None:
    decided = judge(Row(S.TRAINING, S.GRAFTING), Row(S.GERMINATED, S.TRAINING))
    decided = decided.refuse(np.array([0, 1]), Refusal.BUDGET)
    assert [told.verdict for told in decided.explanations()] == [REASONS[Refusal.BUDGET]] * 2
    assert decided.explain(0).gate == "readiness"


def test_a_gate_that_has_opened_since_is_told_by_the_code_of_the_row() -> None:
    decided = judge(Row(S.GRAFTING, S.STABILIZATION)).refuse(np.array([0]), Refusal.GATE)
    assert decided.explain(0).verdict == REASONS[Refusal.GATE]


def test_each_row_of_a_batch_has_its_own_explanation() -> None:
    decided = judge(Row(S.DORMANT, S.GERMINATED), Row(S.GRAFTING, S.CULLED), Row(99, 0))
    assert [told.verdict for told in decided.explanations()] == [
        "accepted",
        "the move is not in the table",
        "no state has that number",
    ]
