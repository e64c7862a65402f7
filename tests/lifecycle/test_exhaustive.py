"""Every pair of states, gate input, epoch, cause and objective, against the oracle.

Gate inputs lie at each threshold, one float below, one above, far off, at NaN and at both
infinities; the whole product of a gate's inputs is judged, in one batch and seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import numpy as np
import pytest

from esper_ray.lifecycle import (
    Cause,
    LifecycleManager,
    Refusal,
    StateTransition,
    TransitionContext,
)
from esper_ray.lifecycle import ExtendedLifecycle as S
from tests.lifecycle.oracle import MINIMA, PHASE_2_TABLE, gate_opens, verdict
from tests.lifecycle.rows import OPEN, Row, requests

NAN, INF = math.nan, math.inf
OBJECTIVES = ["gradient_target", "reconstruction", ""]


def around(*limits: float) -> list[float]:
    """Each limit with its neighbours among the floats, and what is no number."""
    near = [float(np.nextafter(x, x + side)) for x in limits for side in (-1.0, 1.0)]
    return [*limits, *near, NAN, INF, -INF]


INPUTS: dict[tuple[S, S], dict[str, list[float]]] = {
    (S.TRAINING, S.GRAFTING): {
        "local_loss": [0.3, 0.0, -2.0, 1e300, NAN, INF, -INF],
        "delta_ratio": around(0.5),
        "alpha_one_loss_ratio": around(1.01),
        "reconstruction_loss": around(0.01),
    },
    (S.GRAFTING, S.STABILIZATION): {"alpha": [*around(1.0), 0.0, 2.0]},
    (S.EVALUATING, S.FINE_TUNING): {
        "performance_delta": [*around(0.0), 0.3],
        "performance_delta_low": [*around(0.0), -0.3, 0.2],
        "stability_score": around(0.8),
    },
    (S.EVALUATING, S.CULLED): {
        "performance_delta": [*around(-0.05), -0.02, 0.0, 0.3],
        "performance_delta_low": [0.0, 5e-324, 0.2, NAN],
        "stability_score": [0.8, float(np.nextafter(0.8, 0.0)), NAN],
        "error_rate": around(0.1),
    },
    (S.FINE_TUNING, S.FOSSILIZED): {
        "total_improvement": around(0.002),
        "total_improvement_low": [*around(0.0), -0.3, 0.2],
        "final_stability": around(0.95),
    },
}
COUNTS = {
    (S.TRAINING, S.GRAFTING): ([99, 100], [0]),
    (S.GRAFTING, S.STABILIZATION): ([0, 49, 50, 51, 200, 2**31 - 1], [0, 6]),
    (S.EVALUATING, S.FINE_TUNING): ([29, 30, 31, 89, 90, 91], [0, 6]),
    (S.EVALUATING, S.CULLED): ([29, 30, 89, 90], [0, 5, 6]),
    (S.FINE_TUNING, S.FOSSILIZED): ([49, 50, 51, 150], [0, 6]),
}


def every_pair() -> Iterator[Row]:
    """All 121 pairs, with what opens every gate, with each number spoilt, and with none."""
    spoilt = [{**OPEN, name: bad} for name in OPEN for bad in (NAN, INF, -INF)]
    nothing = dict.fromkeys(OPEN, NAN)
    for source, target in product(S, S):
        least = MINIMA.get(source.name, 0)
        for epochs, cause in product({0, max(least - 1, 0), least, least + 1, 90}, Cause):
            yield Row(source, target, epochs, cause, 0, OPEN)
            yield Row(source, target, epochs, cause, 6, nothing)
        yield from (Row(source, target, least, Cause.POLICY, 0, metrics) for metrics in spoilt)


def every_input(move: tuple[S, S]) -> Iterator[Row]:
    """The product of all inputs of one gated move."""
    names = list(INPUTS[move])
    epochs, errors = COUNTS[move]
    for values in product(*INPUTS[move].values()):
        metrics = {**OPEN, **dict(zip(names, values, strict=True))}
        for spent, failed in product(epochs, errors):
            cause = Cause.ERROR if spent % 2 else Cause.POLICY
            yield Row(*move, spent, cause, failed, metrics)


def without(metrics: Mapping[str, float], names: set[str]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name not in names}


def expected(rows: Sequence[Row], objective: str, *, replanting: bool = False) -> list[str]:
    return [
        verdict(
            row.source,
            row.target,
            row.cause,
            row.epochs,
            row.errors,
            row.metrics,
            objective,
            replanting=replanting,
        )
        for row in rows
    ]


def agree(rows: Sequence[Row], objective: str, manager: LifecycleManager | None = None) -> None:
    """Judge all rows in one batch and insist that every reason is the oracle's."""
    manager = manager or LifecycleManager()
    decided = manager.judge(requests(rows, objective=objective))
    want = expected(rows, objective, replanting=manager.replanting)
    codes = np.array([Refusal[name] for name in want], dtype=np.uint8)
    wrong = np.flatnonzero(decided.reason != codes)
    told = [(rows[i], Refusal(int(decided.reason[i])).name, want[i]) for i in wrong[:3].tolist()]
    assert not told, f"{len(wrong)} of {len(rows)} rows differ (row, judged, oracle): {told}"


def agree_singly(rows: Sequence[Row], objective: str) -> None:
    """Put the same rows to `validate_transition`, which knows table and gates only."""
    for row in rows:
        source, target = S(row.source), S(row.target)
        metadata = {"objective": objective} if objective else {}
        context = TransitionContext(
            0, source, target, row.epochs, row.metrics, row.errors, metadata=metadata
        )
        accepted, reason = StateTransition.validate_transition(source, target, context)
        legal = (source.name, target.name) in PHASE_2_TABLE
        opens = legal and gate_opens(
            source.name, target.name, row.epochs, row.errors, row.metrics, objective
        )
        assert accepted is opens, (row, reason)
        assert (reason is None) is accepted
        assert accepted or reason


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_lesson_17_all_pairs_are_judged_in_one_batch_as_the_document_says(objective: str) -> None:
    rows = list(every_pair())
    assert len({(row.source, row.target) for row in rows}) == 121
    agree(rows, objective)


def test_all_pairs_are_judged_as_the_document_says_where_replanting_is_on() -> None:
    agree(list(every_pair()), "gradient_target", LifecycleManager(replanting=True))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_lesson_17_all_pairs_are_judged_singly_as_the_document_says(objective: str) -> None:
    agree_singly(list(every_pair()), objective)


@pytest.mark.parametrize("objective", OBJECTIVES[:2])
@pytest.mark.parametrize("move", list(INPUTS))
def test_lesson_26_every_input_of_a_gate_is_judged_as_the_document_says(
    move: tuple[S, S], objective: str
) -> None:
    rows = list(every_input(move))
    agree(rows, objective)
    agree_singly(rows, objective)


@pytest.mark.parametrize("move", list(INPUTS))
def test_where_no_bound_was_measured_the_mean_is_judged(move: tuple[S, S]) -> None:
    bounds = {name for name in OPEN if name.endswith("_low")}
    rows = [row._replace(metrics=without(row.metrics, bounds)) for row in every_input(move)]
    agree(rows, "gradient_target")
    agree_singly(rows, "gradient_target")


@pytest.mark.parametrize("objective", OBJECTIVES[:2])
@pytest.mark.parametrize(("move", "name"), [(m, n) for m, names in INPUTS.items() for n in names])
def test_lesson_26_an_input_without_a_column_is_judged_as_not_measured(
    move: tuple[S, S], name: str, objective: str
) -> None:
    rows = [row._replace(metrics=without(row.metrics, {name})) for row in every_input(move)]
    agree(rows[:: max(1, len(rows) // 500)], objective)
    agree_singly(rows[:: max(1, len(rows) // 500)], objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_lesson_26_no_gate_opens_where_nothing_at_all_was_measured(objective: str) -> None:
    rows = [Row(*move, 89, Cause.POLICY, 5, {}) for move in INPUTS]
    rows += [row._replace(epochs=1_000) for row in rows]
    agree(rows, objective)
    decided = LifecycleManager().judge(requests(rows, objective=objective))
    assert [S(rows[i].target) for i in np.flatnonzero(decided.accepted)] == [S.CULLED]


@pytest.mark.parametrize("objective", OBJECTIVES[:2])
def test_one_batch_of_all_moves_is_judged_as_the_moves_apart(objective: str) -> None:
    rows = [row for move in INPUTS for row in list(every_input(move))[::7]] + list(every_pair())
    order = np.random.default_rng(5).permutation(len(rows))
    agree([rows[i] for i in order.tolist()], objective)
