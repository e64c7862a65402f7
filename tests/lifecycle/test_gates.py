"""Every clause of every gate: open at its threshold, shut beyond it and without a number."""

from __future__ import annotations

import math

import numpy as np
import pytest

from esper_ray.lifecycle import (
    GATES,
    RECONSTRUCTION,
    Clause,
    Gate,
    GateSettings,
    StateTransition,
    TransitionContext,
    gate_of,
)
from esper_ray.lifecycle import ExtendedLifecycle as S

Metrics = dict[str, float]
GRAFT = (S.TRAINING, S.GRAFTING)
BLENDED = (S.GRAFTING, S.STABILIZATION)
HELPS = (S.EVALUATING, S.FINE_TUNING)
HARMS = (S.EVALUATING, S.CULLED)
KEEP = (S.FINE_TUNING, S.FOSSILIZED)
OPEN: dict[tuple[S, S], Metrics] = {
    GRAFT: {"local_loss": 0.3, "delta_ratio": 0.1, "alpha_one_loss_ratio": 1.0},
    BLENDED: {"alpha": 1.0},
    HELPS: {"performance_delta": 0.1, "performance_delta_low": 0.1, "stability_score": 0.9},
    KEEP: {"total_improvement": 0.1, "total_improvement_low": 0.1, "final_stability": 0.99},
}
NOT_NUMBERS = [math.nan, math.inf, -math.inf]


def judge(
    move: tuple[S, S],
    metrics: Metrics,
    *,
    epochs: int = 0,
    errors: int = 0,
    objective: str = "gradient_target",
    settings: GateSettings | None = None,
) -> tuple[bool, str | None]:
    context = TransitionContext(
        seed_id=0,
        current_state=move[0],
        target_state=move[1],
        epochs_in_state=epochs,
        performance_metrics=metrics,
        error_count=errors,
        metadata={"objective": objective},
    )
    return StateTransition.validate_transition(*move, context, settings)


CLAUSES = [
    (GRAFT, "delta_ratio", 0.5, 0.500001, "delta_ratio is 0.500001, and <= 0.5 is needed"),
    (
        GRAFT,
        "alpha_one_loss_ratio",
        1.01,
        1.01001,
        "alpha_one_loss_ratio is 1.01001, and <= 1.01 is needed",
    ),
    (BLENDED, "alpha", 1.0, 0.999999, "alpha is 0.999999, and exactly 1 is needed"),
    (
        HELPS,
        "performance_delta_low",
        1e-9,
        0.0,
        "the lower bound of performance_delta is 0, and > 0 is needed",
    ),
    (HELPS, "stability_score", 0.8, 0.799999, "stability_score is 0.799999, and >= 0.8 is needed"),
    (
        KEEP,
        "total_improvement",
        0.002,
        0.001999,
        "total_improvement is 0.001999, and >= 0.002 is needed",
    ),
    (
        KEEP,
        "total_improvement_low",
        1e-9,
        0.0,
        "the lower bound of total_improvement is 0, and > 0 is needed",
    ),
    (KEEP, "final_stability", 0.95, 0.949999, "final_stability is 0.949999, and >= 0.95 is needed"),
]


@pytest.mark.parametrize(("move", "name", "at", "beyond", "reason"), CLAUSES)
def test_a_gate_opens_at_its_threshold_and_shuts_beyond_it(
    move: tuple[S, S], name: str, at: float, beyond: float, reason: str
) -> None:
    assert judge(move, {**OPEN[move], name: at}) == (True, None)
    assert judge(move, {**OPEN[move], name: beyond}) == (False, reason)


@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize(
    ("move", "name"), [(move, name) for move, metrics in OPEN.items() for name in metrics]
)
def test_lesson_26_a_gate_refuses_what_is_not_a_number(
    move: tuple[S, S], name: str, value: float
) -> None:
    accepted, reason = judge(move, {**OPEN[move], name: value})
    assert not accepted
    assert name.removesuffix("_low") in str(reason)
    assert "not measured" in str(reason)


@pytest.mark.parametrize(
    ("move", "name"),
    [(m, n) for m, metrics in OPEN.items() for n in metrics if not n.endswith("_low")],
)
def test_lesson_26_a_gate_refuses_what_was_not_measured(move: tuple[S, S], name: str) -> None:
    metrics = {key: value for key, value in OPEN[move].items() if not key.startswith(name)}
    accepted, reason = judge(move, metrics)
    assert not accepted
    assert f"{name} was not measured" in str(reason)


@pytest.mark.parametrize(
    ("move", "name"), [(HELPS, "performance_delta"), (KEEP, "total_improvement")]
)
def test_the_mean_stands_in_where_no_interval_is_given(move: tuple[S, S], name: str) -> None:
    metrics = {key: value for key, value in OPEN[move].items() if not key.endswith("_low")}
    assert judge(move, metrics) == (True, None)
    assert not judge(move, {**metrics, name: 0.0})[0]


def test_alpha_above_one_does_not_pass_for_exactly_one() -> None:
    assert not judge(BLENDED, {"alpha": 1.0000001})[0]


def test_reconstruction_is_judged_by_its_own_loss_alone() -> None:
    assert judge(GRAFT, {"reconstruction_loss": 0.01}, objective="reconstruction") == (True, None)
    refused = judge(GRAFT, {"reconstruction_loss": 0.011}, objective="reconstruction")
    assert refused == (False, "reconstruction_loss is 0.011, and <= 0.01 is needed")


@pytest.mark.parametrize("metrics", [{}, *({"reconstruction_loss": v} for v in NOT_NUMBERS)])
def test_lesson_26_an_unmeasured_reconstruction_loss_is_refused(metrics: Metrics) -> None:
    accepted, reason = judge(GRAFT, {**OPEN[GRAFT], **metrics}, objective="reconstruction")
    assert not accepted
    assert "reconstruction_loss was not measured" in str(reason)


@pytest.mark.parametrize(
    ("metrics", "errors", "epochs", "culled"),
    [
        ({"performance_delta": -0.05}, 0, 0, False),
        ({"performance_delta": -0.0500001}, 0, 0, True),
        ({"error_rate": 0.1}, 0, 0, False),
        ({"error_rate": 0.1000001}, 0, 0, True),
        ({}, 5, 0, False),
        ({}, 6, 0, True),
        ({}, 0, 89, False),
        ({}, 0, 90, True),
        (OPEN[HELPS], 0, 90, False),
        ({**OPEN[HELPS], "stability_score": 0.79}, 0, 90, True),
        ({"performance_delta": math.nan, "error_rate": math.nan}, 0, 89, False),
        ({"performance_delta": -math.inf, "error_rate": math.inf}, 0, 89, False),
        ({"performance_delta": math.nan, "error_rate": 0.2}, 0, 0, True),
        ({"performance_delta": -0.1, "error_rate": math.nan}, 0, 0, True),
    ],
)
def test_a_judged_seed_is_culled_for_harm_failure_or_indecision_only(
    metrics: Metrics, errors: int, epochs: int, culled: bool
) -> None:
    accepted, reason = judge(HARMS, metrics, errors=errors, epochs=epochs)
    assert accepted is culled
    assert (reason is None) is culled


@pytest.mark.parametrize("delta", [-0.05, -0.03, 0.0])
def test_lesson_24_a_seed_that_neither_helps_nor_harms_is_culled_in_the_end(delta: float) -> None:
    metrics = {"performance_delta": delta, "stability_score": 1.0}
    assert not judge(HELPS, metrics, epochs=90)[0]
    assert not judge(HARMS, metrics, epochs=89)[0]
    assert judge(HARMS, metrics, epochs=90) == (True, None)


@pytest.mark.parametrize(
    ("move", "metrics", "strict"),
    [
        (GRAFT, OPEN[GRAFT], GateSettings(delta_ratio_max=0.05)),
        (GRAFT, OPEN[GRAFT], GateSettings(alpha_one_loss_ratio_max=0.9)),
        (HELPS, OPEN[HELPS], GateSettings(performance_delta_min=0.2)),
        (HELPS, OPEN[HELPS], GateSettings(stability_min=0.95)),
        (KEEP, OPEN[KEEP], GateSettings(improvement_min=0.2)),
        (KEEP, OPEN[KEEP], GateSettings(final_stability_min=0.995)),
        (HARMS, {"performance_delta": -0.06}, GateSettings(cull_performance_delta=-0.1)),
        (HARMS, {"error_rate": 0.2}, GateSettings(cull_error_rate=0.3)),
    ],
)
def test_thresholds_are_settings(move: tuple[S, S], metrics: Metrics, strict: GateSettings) -> None:
    assert judge(move, metrics)[0]
    assert not judge(move, metrics, settings=strict)[0]


def test_the_gate_of_training_depends_on_the_objective_and_no_other_does() -> None:
    for move, gate in GATES.items():
        other = gate_of(*move, "reconstruction")
        assert gate_of(*move, "gradient_target") is gate
        assert other is (RECONSTRUCTION if move == GRAFT else gate)


def test_a_move_without_a_gate_has_none() -> None:
    assert gate_of(S.DORMANT, S.GERMINATED, "") is None
    assert gate_of(S.TRAINING, S.CULLED, "") is None


def test_gates_have_names_of_their_own_and_say_what_they_ask() -> None:
    gates = [*GATES.values(), RECONSTRUCTION]
    assert len({gate.name for gate in gates}) == len(gates)
    assert all(gate.about.endswith(".") for gate in gates)


@pytest.mark.parametrize(
    ("gate", "rules"),
    [
        (RECONSTRUCTION, {"reconstruction_loss": "<= 0.01"}),
        (
            GATES[GRAFT],
            {
                "local_loss": "a finite value",
                "delta_ratio": "<= 0.5",
                "alpha_one_loss_ratio": "<= 1.01",
            },
        ),
        (GATES[BLENDED], {"alpha": "exactly 1"}),
        (
            GATES[HELPS],
            {
                "performance_delta": "a finite value",
                "performance_delta_low": "> 0",
                "stability_score": ">= 0.8",
            },
        ),
        (
            GATES[HARMS],
            {
                "performance_delta": "< -0.05",
                "error_rate": "> 0.1",
                "error_count": "> 5",
                "epochs_in_state": ">= 90",
                "performance_delta_low": "> 0",
                "stability_score": ">= 0.8",
            },
        ),
        (
            GATES[KEEP],
            {
                "total_improvement": ">= 0.002",
                "total_improvement_low": "> 0",
                "final_stability": ">= 0.95",
            },
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Gate) else "",
)
def test_a_gate_tells_what_each_number_is_compared_with(gate: Gate, rules: dict[str, str]) -> None:
    assert gate.thresholds(GateSettings()) == rules


def test_thresholds_are_told_as_configured() -> None:
    settings = GateSettings(stability_min=0.5, inconclusive_epochs=12)
    assert GATES[HELPS].thresholds(settings)["stability_score"] == ">= 0.5"
    assert GATES[HARMS].thresholds(settings)["epochs_in_state"] == ">= 12"


def test_one_gate_judges_a_seed_and_an_array_of_seeds() -> None:
    values = {"alpha": np.array([1.0, 0.5, math.nan])}
    assert GATES[BLENDED].opens(values, GateSettings()).tolist() == [True, False, False]
    assert GATES[BLENDED].opens({"alpha": 1.0}, GateSettings()) is True


def test_a_fallback_is_read_only_where_the_metric_was_never_given() -> None:
    clause = Clause("low", ">", 0.0, fallback="mean")
    assert clause.value({"mean": 2.0}) == 2.0
    assert math.isnan(clause.value({"mean": 2.0, "low": math.nan}))
    assert math.isnan(clause.value({}))


def test_a_gate_names_all_that_it_may_read_that_of_shut_gates_included() -> None:
    assert GATES[HARMS].reads >= {
        "performance_delta",
        "performance_delta_low",
        "stability_score",
        "error_rate",
        "error_count",
        "epochs_in_state",
    }
    assert all(gate.reads >= {c.metric for c in gate.clauses()} for gate in GATES.values())
