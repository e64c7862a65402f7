"""The one writer of seed state, against a slow model that writes row by row."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_ray.events import TransitionBatch
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.lifecycle import StateTransition
from esper_ray.seeds import ExtendedStateTensor, Refusal
from tests.builders import PATHS, metrics, same_bits, transitions, walk

SEEDS = 4
Mode = Literal["all", "report"]


@dataclass
class Row:
    """One seed of the slow model."""

    state: int = 0
    generation: int = 0
    blueprint: int = -1
    epochs: int = 0
    strategy: int = 0
    parent: int = -1
    checkpoint: int = -1
    score: int = 0
    errors: int = 0
    alpha: float = 0.0
    pause: int = 0
    history: list[tuple[int, int]] = field(default_factory=list)
    """Every entry ever made, oldest first."""


@dataclass(frozen=True)
class Move:
    """One row of a transition batch."""

    seed_id: int
    expected: int
    generation: int
    target: int
    cause: int
    blueprint: int
    strategy: int
    checkpoint: int


def legal(source: int, target: int) -> bool:
    known = set(map(int, S))
    return {source, target} <= known and S(target) in StateTransition.VALID_TRANSITIONS[S(source)]


def refusal(row: Row, move: Move) -> Refusal:
    if row.generation != move.generation:
        return Refusal.STALE_GENERATION
    if row.state != move.expected:
        return Refusal.STALE_STATE
    return Refusal.NONE if legal(move.expected, move.target) else Refusal.NOT_IN_TABLE


def apply_one(row: Row, move: Move, epoch: int) -> Row:
    freed = move.target in (S.CULLED, S.CANCELLED)
    blueprint = move.blueprint if move.blueprint >= 0 else row.blueprint
    entry = (row.state | move.target << 8 | move.cause << 16, epoch)
    return replace(
        row,
        state=move.target,
        epochs=0,
        parent=row.state,
        blueprint=-1 if freed else blueprint,
        strategy=move.strategy if move.strategy >= 0 else row.strategy,
        checkpoint=move.checkpoint if move.checkpoint >= 0 else row.checkpoint,
        alpha=1.0 if S.STABILIZATION <= move.target <= S.FOSSILIZED else 0.0,
        pause=0,
        history=[*row.history, entry],
    )


def model_of(rows: list[Row]) -> ExtendedStateTensor:
    """The tensor that holds `rows`."""
    state = ExtendedStateTensor(len(rows))
    for i, row in enumerate(rows):
        state.columns[:, i] = torch.tensor(
            [
                row.state,
                row.blueprint,
                row.epochs,
                row.strategy,
                row.parent,
                row.checkpoint,
                row.score,
                row.errors,
            ]
        )
        state.generation[i], state.alpha[i], state.pause[i] = row.generation, row.alpha, row.pause
        state.transition_count[i] = len(row.history)
        for number, entry in enumerate(row.history):
            state.transition_history[i, number % 10] = torch.tensor(entry)
    state.changed()
    return state


def rows_of(state: ExtendedStateTensor) -> list[list[float]]:
    return [
        [*column, generation, alpha, pause]
        for column, generation, alpha, pause in zip(
            state.state_tensor.tolist(),
            state.generation.tolist(),
            state.alpha.tolist(),
            state.pause.tolist(),
            strict=True,
        )
    ]


def history_of(state: ExtendedStateTensor, seed_id: int) -> list[tuple[int, ...]]:
    """Valid entries of one seed, oldest first."""
    count = int(state.transition_count[seed_id])
    slots = [slot % 10 for slot in range(max(0, count - 10), count)]
    return [tuple(state.transition_history[seed_id, slot].tolist()) for slot in slots]


small = st.integers(0, 3)
codes = st.sampled_from([int(s) for s in S])
rows = st.lists(
    st.builds(
        Row,
        state=codes,
        generation=small,
        blueprint=st.integers(-1, 3),
        epochs=st.integers(0, 400),
        strategy=small,
        parent=st.integers(-1, 10),
        checkpoint=st.integers(-1, 99),
        score=st.integers(-2000, 2000),
        errors=small,
        alpha=st.sampled_from([0.0, 0.25, 1.0]),
        pause=st.integers(0, 10),
        history=st.integers(0, 13).map(lambda n: [(1000 + i, i) for i in range(n)]),
    ),
    min_size=SEEDS,
    max_size=SEEDS,
)


@st.composite
def moves(draw: st.DrawFn, rows: list[Row]) -> list[Move]:
    """Moves of distinct seeds, most of them current and legal."""
    made = []
    for seed_id in draw(st.lists(st.integers(0, SEEDS - 1), unique=True)):
        row = rows[seed_id]
        ways = [int(t) for t in StateTransition.VALID_TRANSITIONS[S(row.state)]]
        made.append(
            Move(
                seed_id,
                expected=draw(st.sampled_from([row.state] * 5 + [0, 2, 10])),
                generation=draw(st.sampled_from([row.generation] * 5 + [0, 1])),
                target=draw(st.sampled_from(ways * 3 + list(map(int, S)) + [-1, 11, 99])),
                cause=draw(small),
                blueprint=draw(st.integers(-1, 3)),
                strategy=draw(st.integers(-1, 3)),
                checkpoint=draw(st.integers(-1, 99)),
            )
        )
    return made


def batch_of(made: list[Move], epoch: int) -> TransitionBatch:
    return transitions(
        [m.seed_id for m in made],
        [m.expected for m in made],
        [m.target for m in made],
        generation=[m.generation for m in made],
        cause=[m.cause for m in made],
        blueprint_id=[m.blueprint for m in made],
        strategy=[m.strategy for m in made],
        checkpoint_id=[m.checkpoint for m in made],
        epoch=epoch,
    )


@settings(max_examples=100, deadline=None)
@given(data=st.data(), before=rows, mode=st.sampled_from(["all", "report"]))
def test_lesson_20_a_batch_writes_what_the_slow_model_writes(
    data: st.DataObject, before: list[Row], mode: Mode
) -> None:
    made = data.draw(moves(before))
    state = model_of(before)
    applied, reason = state.compare_and_set(batch_of(made, epoch=7), mode)

    refusals = [refusal(before[m.seed_id], m) for m in made]
    if mode == "all" and any(refusals):
        refusals = [r or Refusal.BATCH_REFUSED for r in refusals]
    after = list(before)
    for move, refused in zip(made, refusals, strict=True):
        if not refused:
            after[move.seed_id] = apply_one(before[move.seed_id], move, epoch=7)
    assert reason.tolist() == refusals
    assert applied.tolist() == [not r for r in refusals]
    assert rows_of(state) == rows_of(model_of(after))
    assert [history_of(state, i) for i in range(SEEDS)] == [row.history[-10:] for row in after]
    assert state.view().state.tolist() == [row.state for row in after]


@pytest.mark.parametrize("target", [-1, -11, 11, 99])
@pytest.mark.parametrize("source", [S.GRAFTING, S.DORMANT, S.CULLED])
def test_lesson_19_no_seed_takes_a_state_that_does_not_exist(source: S, target: int) -> None:
    state = ExtendedStateTensor(2)
    walk(state, [1], source)
    before = rows_of(state)
    applied, reason = state.compare_and_set(transitions([1], source, [target]))
    assert (applied.tolist(), reason.tolist()) == ([False], [Refusal.NOT_IN_TABLE])
    assert rows_of(state) == before


@pytest.mark.parametrize("source", [-1, 11, 99])
def test_lesson_19_no_seed_is_expected_in_a_state_that_does_not_exist(source: int) -> None:
    state = ExtendedStateTensor(1)
    applied, reason = state.compare_and_set(transitions([0], [source], S.GERMINATED))
    assert (applied.tolist(), reason.tolist()) == ([False], [Refusal.STALE_STATE])


@pytest.mark.parametrize("source", list(S))
@pytest.mark.parametrize("target", list(S))
def test_lesson_17_tensor_and_table_agree_on_every_pair(source: S, target: S) -> None:
    state = ExtendedStateTensor(1)
    walk(state, [0], source)
    applied, _ = state.compare_and_set(transitions([0], source, target))
    assert applied.tolist() == [target in StateTransition.VALID_TRANSITIONS[source]]


def test_lesson_21_repeated_ids_are_refused_and_change_nothing() -> None:
    state = ExtendedStateTensor(4)
    before = copy.deepcopy(state.state_dict())
    with pytest.raises(ValueError, match=r"seed ids repeat in one batch: \[1, 2, 2\]"):
        state.compare_and_set(transitions([2, 1, 2], S.DORMANT, S.GERMINATED))
    assert all(same_bits(before[name], value) for name, value in state.state_dict().items())


@pytest.mark.parametrize("unknown", [-1, 4])
def test_lesson_12_unknown_ids_are_refused_and_change_nothing(unknown: int) -> None:
    state = ExtendedStateTensor(4)
    before = copy.deepcopy(state.state_dict())
    with pytest.raises(IndexError, match=rf"\[0, {unknown}\] are not all in 0..3"):
        state.compare_and_set(transitions([0, unknown], S.DORMANT, S.GERMINATED))
    with pytest.raises(IndexError, match=rf"\[0, {unknown}\] are not all in 0..3"):
        state.record(metrics([0, unknown], score=[1.0, 1.0]))
    assert all(same_bits(before[name], value) for name, value in state.state_dict().items())


def test_lesson_21_metrics_of_repeated_ids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"seed ids repeat in one batch: \[1, 1\]"):
        ExtendedStateTensor(4).record(metrics([1, 1]))


def test_an_empty_batch_changes_nothing() -> None:
    state = ExtendedStateTensor(2)
    applied, reason = state.compare_and_set(transitions([], [], []), mode="all")
    assert (len(applied), len(reason)) == (0, 0)
    assert state.view().state.tolist() == [0, 0]


def test_seeds_are_born_dormant_with_no_blueprint_parent_or_checkpoint() -> None:
    state = ExtendedStateTensor(2)
    assert state.state_tensor.tolist() == [[0, -1, 0, 0, -1, -1, 0, 0]] * 2
    assert state.state_tensor.dtype == torch.int32
    rest = (state.alpha, state.transition_count, state.metrics_valid, state.generation)
    assert not any(column.any() for column in rest)


def test_the_transition_count_wraps_without_losing_the_ring_cursor() -> None:
    state = ExtendedStateTensor(1)
    for epoch in range(100):
        if epoch == 20:
            state.transition_count[0] += 32_700  # whole rings, close to what int16 holds
        state.columns[state.LIFECYCLE_STATE] = S.DORMANT
        state.changed()
        state.compare_and_set(transitions([0], S.DORMANT, S.GERMINATED, epoch=epoch))
        if epoch >= 10:
            assert int(state.transition_count) >= 10
            assert [e for _, e in history_of(state, 0)] == list(range(epoch - 9, epoch + 1))


def test_a_seed_is_a_row_of_its_own() -> None:
    state = ExtendedStateTensor(3)
    before = rows_of(state)
    walk(state, [1], S.GRAFTING)
    after = rows_of(state)
    assert (after[0], after[2]) == (before[0], before[2])
    assert after[1] != before[1]


# ---- advance ---------------------------------------------------------------------------------


def test_lesson_18_epochs_advance_in_every_state_that_is_not_terminal() -> None:
    state = ExtendedStateTensor(len(S))
    for code in S:
        walk(state, [int(code)], code)
    advance(state)
    advance(state)
    expected = [2] * 7 + [0] * 4
    assert state.state_tensor[:, state.EPOCHS_IN_STATE].tolist() == expected
    assert state.view().epochs_in_state.tolist() == expected


def advance(state: ExtendedStateTensor, alpha: float = 0.5) -> None:
    count = state.num_seeds
    shorts = torch.ones(count, dtype=torch.int16)
    state.advance(torch.full((count,), alpha), shorts * 3, shorts * 2)


def test_only_grafting_seeds_take_a_new_alpha() -> None:
    state = ExtendedStateTensor(len(S))
    for code in S:
        walk(state, [int(code)], code)
    advance(state, alpha=0.5)
    assert state.alpha.tolist() == [0, 0, 0, 0.5, 1, 1, 1, 1, 0, 0, 0]
    assert state.view().alpha.tolist() == state.alpha.tolist()
    assert state.pause.tolist() == [3 * (code == S.GRAFTING) for code in S]
    assert state.pauses.tolist() == [2 * (code == S.GRAFTING) for code in S]


def test_epochs_in_state_saturate() -> None:
    state = ExtendedStateTensor(1)
    state.columns[state.EPOCHS_IN_STATE] = 2**31 - 2
    for _ in range(3):
        advance(state)
    assert int(state.columns[state.EPOCHS_IN_STATE]) == 2**31 - 1


@pytest.mark.parametrize("goal", list(S))
def test_lesson_02_alpha_is_one_exactly_from_stabilization_to_fossilized(goal: S) -> None:
    state = ExtendedStateTensor(1)
    for source, target in pairwise(PATHS[goal]):
        state.compare_and_set(transitions([0], source, target, blueprint_id=0))
    assert state.alpha.tolist() == [1.0 if S.STABILIZATION <= goal <= S.FOSSILIZED else 0.0]


# ---- errors and metrics ----------------------------------------------------------------------


def test_errors_are_counted_per_row_and_seen_at_once() -> None:
    state = ExtendedStateTensor(3)
    assert state.view().error_count.tolist() == [0, 0, 0]
    state.count_errors(torch.tensor([True, False, True]))
    state.count_errors(torch.tensor([True, False, False]))
    assert state.view().error_count.tolist() == [2, 0, 1]


SCORES = [
    (0.65, 650),
    (-0.65, -650),
    (0.0005, 1),
    (-0.0005, -1),
    (0.00049, 0),
    (-0.00049, 0),
    (0.0625, 63),
    (-0.0625, -63),
    (0.0, 0),
    (-0.0, 0),
    (1.2344, 1234),
    (3e38, 2**31 - 1),
    (-3e38, -(2**31)),
]


@pytest.mark.parametrize(("score", "stored"), SCORES)
def test_scores_are_rounded_half_away_from_zero_and_saturate(score: float, stored: int) -> None:
    state = ExtendedStateTensor(2)
    state.record(metrics([1], score=[score]))
    assert state.state_tensor[:, state.EVALUATION_SCORE].tolist() == [0, stored]


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_a_number_leaves_the_old_one(score: float) -> None:
    state = ExtendedStateTensor(1)
    state.record(metrics([0], score=[0.25]))
    state.record(metrics([0], score=[score]))
    assert int(state.columns[state.EVALUATION_SCORE]) == 250


def test_lesson_26_an_unmeasured_metric_is_not_stored_as_zero() -> None:
    state = ExtendedStateTensor(3)
    state.record(metrics([2, 0], [[1, 2, 3, 4], [5, 6, 7, 8]], valid=[0b0101, 0b1111]))
    state.record(metrics([2], [[9, 9, 9, 9]], valid=[0b0010]))
    assert state.performance_metrics.tolist() == [[5, 6, 7, 8], [0, 0, 0, 0], [1, 9, 3, 0]]
    assert state.metrics_valid.tolist() == [0b1111, 0, 0b0111]


# ---- copies ----------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(before=rows)
def test_lesson_38_a_state_dict_holds_everything(before: list[Row]) -> None:
    state, other = model_of(before), ExtendedStateTensor(SEEDS)
    state.record(metrics([0], [[1, 2, 3, 4]], valid=[15], score=[0.5]))
    other.view()
    other.load_state_dict(state.state_dict())
    names = [name for name, _ in state.named_buffers()]
    assert all(same_bits(state.get_buffer(n), other.get_buffer(n)) for n in names)
    assert other.view().state.tolist() == [row.state for row in before]


def test_lesson_14_a_loaded_state_is_the_one_that_transitions_meet() -> None:
    state, trained = ExtendedStateTensor(1), ExtendedStateTensor(1)
    walk(trained, [0], S.TRAINING)
    state.view()
    state.load_state_dict(trained.state_dict())
    applied, _ = state.compare_and_set(transitions([0], S.TRAINING, S.GRAFTING))
    assert applied.tolist() == [True]


def test_a_deep_copy_lives_apart() -> None:
    state = ExtendedStateTensor(2)
    walk(state, [0], S.TRAINING)
    twin = copy.deepcopy(state)
    walk(state, [1], S.TRAINING)
    assert twin.view().state.tolist() == [2, 0]
    assert state.view().state.tolist() == [2, 2]


def test_lesson_38_moving_a_state_keeps_it() -> None:
    state = ExtendedStateTensor(2)
    walk(state, [1], S.STABILIZATION)
    before = rows_of(state)
    state.to("cpu").to(torch.float64)
    assert rows_of(state) == before
    assert state.to("meta").columns.device.type == "meta"


def test_the_host_copy_does_not_change_under_its_reader() -> None:
    state = ExtendedStateTensor(2)
    seen = state.view()
    walk(state, [1], S.TRAINING)
    assert seen.state.tolist() == [0, 0]
    assert state.view().rows(S.TRAINING, S.DORMANT).tolist() == [0, 1]
    assert state.view().rows(S.TRAINING).tolist() == [1]


def test_a_seed_costs_less_than_150_bytes() -> None:
    state = ExtendedStateTensor(1_000)
    assert sum(b.nbytes for b in state.state_dict().values()) / 1_000 < 150
