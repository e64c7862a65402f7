"""A row that makes no sense is refused alone: the rest of its batch is judged as if apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_ray.lifecycle import Cause, Decisions, LifecycleManager, Refusal, first_failed
from esper_ray.lifecycle import ExtendedLifecycle as S
from tests.lifecycle.oracle import verdict
from tests.lifecycle.rows import OPEN, Row, judge, names_of, requests

GOOD = Row(S.GERMINATED, S.TRAINING)
BAD = [
    (Row(99, S.GRAFTING), "UNKNOWN_STATE"),
    (Row(-1, S.GRAFTING), "UNKNOWN_STATE"),
    (Row(11, S.GRAFTING), "UNKNOWN_STATE"),
    (Row(S.TRAINING, 99), "UNKNOWN_STATE"),
    (Row(S.TRAINING, -1), "UNKNOWN_STATE"),
    (Row(S.TRAINING, 11), "UNKNOWN_STATE"),
    (Row(S.FOSSILIZED, 99), "UNKNOWN_STATE"),
    (Row(-(2**31), 2**31 - 1), "UNKNOWN_STATE"),
    (Row(99, S.DORMANT, cause=Cause.REPLANT), "UNKNOWN_STATE"),
    (Row(S.CULLED, S.GERMINATED), "TERMINAL"),
    (Row(S.FOSSILIZED, S.ROLLED_BACK, cause=Cause.ERROR), "TERMINAL"),
    (Row(S.DORMANT, S.DORMANT), "NOT_IN_TABLE"),
    (Row(S.TRAINING, S.GRAFTING, metrics={}), "GATE"),
    (Row(S.TRAINING, S.GRAFTING, epochs=-5), "TOO_EARLY"),
]


@pytest.mark.parametrize(("row", "name"), BAD)
def test_lesson_19_a_bad_row_is_refused_and_its_neighbours_are_not(row: Row, name: str) -> None:
    assert names_of(judge(GOOD, row, GOOD)) == ["NONE", name, "NONE"]
    assert names_of(judge(row)) == [name]


def test_a_batch_of_many_bad_rows_gives_each_its_own_reason() -> None:
    rows = [r for bad, _ in BAD for r in (bad, GOOD)]
    expected = [n for _, name in BAD for n in (name, "NONE")]
    assert names_of(judge(*rows)) == expected


def test_every_pair_of_numbers_around_the_states_is_judged() -> None:
    numbers = [-1, *S, 11, 99]
    rows = [Row(source, target) for source in numbers for target in numbers]
    unknown = [not {r.source, r.target} <= set(S) for r in rows]
    assert (judge(*rows).reason == Refusal.UNKNOWN_STATE).tolist() == unknown


def test_an_unknown_cause_is_no_reason_to_waive_anything() -> None:
    assert names_of(judge(Row(S.TRAINING, S.CULLED, 3, cause=77))) == ["TOO_EARLY"]


@pytest.mark.parametrize("names", [None, list(OPEN)])
def test_an_empty_batch_gives_empty_decisions(names: list[str] | None) -> None:
    for manager in (LifecycleManager(), LifecycleManager(replanting=True)):
        decided = manager.judge(requests([], names=names))
        assert len(decided.requests) == 0
        assert decided.reason.dtype == np.uint8
        assert decided.accepted.tolist() == []
        assert list(decided.explanations()) == []


# ---- a batch is its rows -----------------------------------------------------------------------

NUMBERS = st.one_of(
    st.sampled_from([0.0, 0.002, 0.01, 0.1, 0.5, 0.8, 0.95, 1.0, 1.01, -0.05, -0.06]),
    st.floats(allow_nan=True, allow_infinity=True),
)
STATES = st.one_of(st.sampled_from(list(S)), st.sampled_from([-1, 11, 99]))
MOVES = st.one_of(
    st.tuples(STATES, STATES),
    st.sampled_from([(S.TRAINING, S.GRAFTING), (S.EVALUATING, S.CULLED), (S.CULLED, S.DORMANT)]),
    st.sampled_from([(S.EVALUATING, S.FINE_TUNING), (S.FINE_TUNING, S.FOSSILIZED)]),
)


@st.composite
def row(draw: st.DrawFn) -> Row:
    source, target = draw(MOVES)
    return Row(
        source,
        target,
        draw(st.sampled_from([0, 19, 20, 30, 50, 89, 90, 100, 1_000])),
        draw(st.sampled_from(list(Cause))),
        draw(st.integers(0, 8)),
        {name: draw(st.one_of(st.just(OPEN[name]), NUMBERS)) for name in OPEN},
        draw(st.sampled_from([0, 5, 2**15 - 1])),
    )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(row(), max_size=12),
    hidden=st.sets(st.sampled_from(sorted(OPEN))),
    objective=st.sampled_from(["gradient_target", "reconstruction"]),
    replanting=st.booleans(),
)
def test_a_batch_is_judged_as_its_rows_one_by_one(
    rows: list[Row], hidden: set[str], objective: str, replanting: bool
) -> None:
    manager = LifecycleManager(replanting=replanting)
    names = [name for name in OPEN if name not in hidden]
    asked = requests(rows, names=names, objective=objective)
    whole = manager.judge(asked)
    single = [manager.judge(asked.take(np.array([i]))) for i in range(len(rows))]
    assert names_of(whole) == [name for one in single for name in names_of(one)]
    told = [one.explain(0).verdict for one in single]
    assert [whole.explain(i).verdict for i in range(len(rows))] == told
    assert [text == "accepted" for text in told] == whole.accepted.tolist()


@settings(max_examples=150, deadline=None)
@given(row=row(), objective=st.sampled_from(["gradient_target", "reconstruction", "other"]))
def test_any_single_row_is_judged_as_the_document_says(row: Row, objective: str) -> None:
    expected = verdict(
        row.source, row.target, row.cause, row.epochs, row.errors, row.metrics, objective
    )
    assert names_of(judge(row, objective=objective)) == [expected]


# ---- picking rows ------------------------------------------------------------------------------


def batch() -> Decisions:
    return judge(
        Row(S.GERMINATED, S.TRAINING, seed=7, generation=2, errors=1),
        Row(S.TRAINING, S.GRAFTING, 3, seed=9, metrics={**OPEN, "alpha": 0.25}),
        Row(S.CULLED, S.TRAINING, seed=11, cause=Cause.USER),
    )


@pytest.mark.parametrize(
    "picked", [np.array([2, 0]), np.array([0, 2]), np.array([True, False, True])]
)
def test_rows_are_picked_with_all_that_belongs_to_them(picked: np.ndarray) -> None:
    taken, whole = batch().take(picked), batch()
    for name in ("seed_ids", "generation", "source", "target", "cause", "error_count"):
        column = getattr(whole.requests, name)
        assert getattr(taken.requests, name).tolist() == column[picked].tolist()
        assert getattr(taken.requests, name).dtype == column.dtype
    assert (
        taken.requests.metrics["alpha"].tolist() == whole.requests.metrics["alpha"][picked].tolist()
    )
    assert taken.reason.tolist() == whole.reason[picked].tolist()
    assert taken.requests.layer_id == "layer"
    assert taken.requests.objective == "gradient_target"


def test_refusing_rows_leaves_the_first_decisions_as_they_were() -> None:
    first = batch()
    refused = first.refuse(np.array([0]), Refusal.BUDGET)
    assert names_of(first) == ["NONE", "TOO_EARLY", "TERMINAL"]
    assert names_of(refused) == ["BUDGET", "TOO_EARLY", "TERMINAL"]
    assert refused.accepted.tolist() == [False, False, False]
    assert refused.requests is first.requests


def test_gates_read_counts_beside_metrics_and_nothing_that_they_do_not_name() -> None:
    names = {"error_count", "epochs_in_state", "alpha", "no_such_metric"}
    values = batch().requests.values(np.array([0, 1]), names)
    assert {name: column.tolist() for name, column in values.items()} == {
        "error_count": [1, 0],
        "epochs_in_state": [1_000, 3],
        "alpha": [1.0, 0.25],
    }


def test_of_several_failed_checks_the_first_names_the_reason() -> None:
    codes = (Refusal.UNKNOWN_SEED, Refusal.STALE_STATE, Refusal.GATE)
    failed = [
        np.array([True, True, False, False, False]),
        np.array([False, True, True, False, False]),
        np.array([True, True, True, True, False]),
    ]
    expected = [Refusal.UNKNOWN_SEED, Refusal.UNKNOWN_SEED, Refusal.STALE_STATE, Refusal.GATE, 0]
    assert first_failed(codes, failed).tolist() == expected
    nothing = [np.zeros(2, dtype=np.bool_)] * 3
    assert first_failed(codes, nothing).tolist() == [0, 0]
