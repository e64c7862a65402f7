"""The one writer of seed state, case by case."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch

from esper_ray.grafting import GraftingSettings
from esper_ray.lifecycle import TERMINAL_STATES, Cause, Refusal, StateTransition
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.seeds import ExtendedStateTensor
from tests.builders import PATHS, metrics, same_bits, signals, transitions, walk
from tests.seeds.histories import Mode, history_of, same_state

LINEAR = GraftingSettings(ramp_epochs=4)
RENEWABLE = (S.CULLED, S.CANCELLED, S.ROLLED_BACK)


def one_of_each() -> ExtendedStateTensor:
    """Seed i in state i."""
    state = ExtendedStateTensor(len(S))
    for code in S:
        walk(state, [int(code)], code)
    return state


def advance(state: ExtendedStateTensor, settings: GraftingSettings = LINEAR) -> None:
    state.advance(signals(state.grafting.seed_ids.tolist()), settings)


# ---- which rows are applied ------------------------------------------------------------------


def test_seeds_are_born_dormant_with_no_blueprint_parent_or_checkpoint() -> None:
    state = ExtendedStateTensor(2)
    assert state.state_tensor.tolist() == [[0, -1, 0, 0, -1, -1, 0, 0]] * 2
    assert state.state_tensor.dtype == torch.int32
    rest = (state.alpha, state.transition_count, state.metrics_valid, state.generation)
    assert not any(column.any() for column in rest)
    assert len(state.grafting) == 0


def test_the_documents_layouts_are_views() -> None:
    state = ExtendedStateTensor(3)
    shapes = (state.state_tensor, state.transition_history, state.performance_metrics)
    assert [tuple(view.shape) for view in shapes] == [(3, 8), (3, 10, 2), (3, 4)]
    stored = (state.columns, state.history, state.metrics)
    for view, buffer in zip(shapes, stored, strict=True):
        assert view.data_ptr() == buffer.data_ptr()


@pytest.mark.parametrize("target", [-1, -11, 11, 99])
@pytest.mark.parametrize("source", [S.GRAFTING, S.DORMANT, S.CULLED])
def test_lesson_19_no_seed_takes_a_state_that_does_not_exist(source: S, target: int) -> None:
    state = ExtendedStateTensor(2)
    walk(state, [1], source)
    before = copy.deepcopy(state)
    applied, reason = state.compare_and_set(transitions([1], source, [target]))
    assert (applied.tolist(), reason.tolist()) == ([False], [Refusal.UNKNOWN_STATE])
    assert same_state(state, before)


@pytest.mark.parametrize("source", [-1, 11, 99])
def test_lesson_19_no_seed_is_expected_in_a_state_that_does_not_exist(source: int) -> None:
    applied, reason = ExtendedStateTensor(1).compare_and_set(
        transitions([0], [source], S.GERMINATED)
    )
    assert (applied.tolist(), reason.tolist()) == ([False], [Refusal.STALE_STATE])


@pytest.mark.parametrize("source", list(S))
@pytest.mark.parametrize("target", list(S))
def test_lesson_17_tensor_and_table_agree_on_every_pair(source: S, target: S) -> None:
    state = ExtendedStateTensor(1)
    walk(state, [0], source)
    _, reason = state.compare_and_set(transitions([0], source, target))
    if target in StateTransition.VALID_TRANSITIONS[source]:
        assert reason.tolist() == [Refusal.NONE]
    elif source in TERMINAL_STATES:
        assert reason.tolist() == [Refusal.TERMINAL]
    else:
        assert reason.tolist() == [Refusal.NOT_IN_TABLE]


def test_lesson_21_all_rows_of_a_repeated_id_are_refused_and_the_others_applied() -> None:
    state = ExtendedStateTensor(4)
    batch = transitions([2, 1, 2, 3, 2], S.DORMANT, S.GERMINATED)
    applied, reason = state.compare_and_set(batch)
    twice = Refusal.DUPLICATE_SEED
    assert reason.tolist() == [twice, Refusal.NONE, twice, Refusal.NONE, twice]
    assert applied.tolist() == [False, True, False, True, False]
    assert state.lifecycle_state.tolist() == [0, 1, 0, 1]
    assert [len(history_of(state, i)) for i in range(4)] == [0, 1, 0, 1]


@pytest.mark.parametrize("unknown", [-1, -4, 4, 2**40, -(2**63)])
def test_lesson_12_unknown_ids_are_refused_and_the_others_applied(unknown: int) -> None:
    state = ExtendedStateTensor(4)
    _, reason = state.compare_and_set(transitions([0, unknown], S.DORMANT, S.GERMINATED))
    assert reason.tolist() == [Refusal.NONE, Refusal.UNKNOWN_SEED]
    refused = state.record(metrics([unknown, 2], [[1, 1, 1, 1]] * 2, valid=[1, 1], score=[1, 1]))
    assert refused.tolist() == [Refusal.UNKNOWN_SEED, Refusal.NONE]
    assert state.lifecycle_state.tolist() == [1, 0, 0, 0]
    assert state.columns[state.EVALUATION_SCORE].tolist() == [0, 0, 1000, 0]
    assert state.metrics_valid.tolist() == [0, 0, 1, 0]


def test_one_refused_row_holds_back_a_batch_of_mode_all() -> None:
    state = ExtendedStateTensor(3)
    before = copy.deepcopy(state)
    batch = transitions([0, 1, 2], S.DORMANT, [S.GERMINATED, S.TRAINING, S.GERMINATED])
    applied, reason = state.compare_and_set(batch, mode="all")
    back = Refusal.BATCH_REFUSED
    assert not applied.any()
    assert reason.tolist() == [back, Refusal.NOT_IN_TABLE, back]
    assert same_state(state, before)


@pytest.mark.parametrize("mode", ["all", "report"])
def test_an_empty_batch_changes_nothing(mode: Mode) -> None:
    state = ExtendedStateTensor(2)
    applied, reason = state.compare_and_set(transitions([], [], []), mode=mode)
    assert (len(applied), len(reason)) == (0, 0)
    assert len(state.record(metrics([]))) == 0
    assert same_state(state, ExtendedStateTensor(2))


@pytest.mark.parametrize("strategy", [5, 99, -2])
def test_a_strategy_that_nobody_registered_is_refused(strategy: int) -> None:
    state = ExtendedStateTensor(1)
    _, reason = state.compare_and_set(transitions([0], S.DORMANT, S.GERMINATED, strategy=strategy))
    assert reason.tolist() == [Refusal.UNKNOWN_STRATEGY]


def test_a_seed_is_a_row_of_its_own() -> None:
    state = ExtendedStateTensor(3)
    before = state.state_tensor.tolist()
    walk(state, [1], S.GRAFTING)
    after = state.state_tensor.tolist()
    assert (after[0], after[2]) == (before[0], before[2])
    assert after[1] != before[1]


def test_the_first_reason_is_the_one_that_is_named() -> None:
    state = ExtendedStateTensor(2)
    batch = transitions([0, 0, 1, 1], [7, 7, 7, 7], [99] * 4, generation=5, strategy=88)
    assert set(state.compare_and_set(batch)[1].tolist()) == {Refusal.DUPLICATE_SEED}
    batch = batch.take(np.array([0, 2]))
    assert state.compare_and_set(batch)[1].tolist() == [Refusal.STALE_GENERATION] * 2
    batch.expected_generation[:] = 0
    assert state.compare_and_set(batch)[1].tolist() == [Refusal.STALE_STATE] * 2
    batch.expected_state[:] = 0
    assert state.compare_and_set(batch)[1].tolist() == [Refusal.UNKNOWN_STATE] * 2


# ---- what a transition writes ----------------------------------------------------------------


@pytest.mark.parametrize("goal", [state for state in S if state is not S.DORMANT])
def test_a_transition_remembers_the_state_before_it(goal: S) -> None:
    state = ExtendedStateTensor(1)
    walk(state, [0], goal)
    assert int(state.columns[state.PARENT_STATE]) == PATHS[goal][-2]
    moves = [(word & 0xFF, word >> 8 & 0xFF) for word, _ in history_of(state, 0)]
    assert moves == list(pairwise(PATHS[goal]))


@pytest.mark.parametrize("goal", list(S))
def test_lesson_02_alpha_is_one_exactly_from_stabilization_to_fossilized(goal: S) -> None:
    state = ExtendedStateTensor(1)
    for source, target in pairwise(PATHS[goal]):
        state.compare_and_set(transitions([0], source, target, blueprint_id=0))
    assert state.alpha.tolist() == [1.0 if S.STABILIZATION <= goal <= S.FOSSILIZED else 0.0]


@pytest.mark.parametrize("goal", list(S))
def test_a_seed_that_grows_nothing_has_no_blueprint(goal: S) -> None:
    state = ExtendedStateTensor(1)
    walk(state, [0], goal)
    kept = goal not in (S.DORMANT, S.CULLED, S.CANCELLED)
    assert int(state.columns[state.BLUEPRINT_ID]) == (0 if kept else -1)


def test_the_transition_count_wraps_without_losing_the_ring_cursor() -> None:
    state = ExtendedStateTensor(1)
    for epoch in range(100):
        if epoch == 20:
            state.transition_count[0] += 32_700  # whole rings, close to what int16 holds
        state.columns[state.LIFECYCLE_STATE] = S.DORMANT
        state.changed()
        state.compare_and_set(transitions([0], S.DORMANT, S.GERMINATED, epoch=epoch))
        assert state.last_change().tolist() == [epoch]
        if epoch >= 10:
            assert int(state.transition_count) >= 10
            assert [e for _, e in history_of(state, 0)] == list(range(epoch - 9, epoch + 1))
    assert int(state.transition_count) < 100


def test_the_last_change_of_a_seed_that_never_changed_is_none() -> None:
    state = ExtendedStateTensor(3)
    state.compare_and_set(transitions([1], S.DORMANT, S.GERMINATED, epoch=6))
    assert state.last_change().tolist() == [-1, 6, -1]
    assert state.last_change(np.array([2, 1])).tolist() == [-1, 6]


# ---- replanting ------------------------------------------------------------------------------


@pytest.mark.parametrize("source", list(S))
def test_terminal_seeds_but_fossilized_ones_can_be_replanted(source: S) -> None:
    state = ExtendedStateTensor(1)
    walk(state, [0], source)
    batch = transitions([0], source, S.DORMANT, cause=Cause.REPLANT)
    _, reason = state.compare_and_set(batch)
    expected = Refusal.NONE if source in RENEWABLE else Refusal.NOT_IN_TABLE
    assert reason.tolist() == [expected]
    assert int(state.generation) == (source in RENEWABLE)


@pytest.mark.parametrize("source", RENEWABLE)
def test_lesson_25_a_replanted_seed_is_newborn_but_for_generation_and_history(source: S) -> None:
    state, newborn = ExtendedStateTensor(1), ExtendedStateTensor(1)
    walk(state, [0], source)
    state.count_errors(torch.tensor([True]))
    state.record(metrics([0], [[1, 2, 3, 4]], valid=[15], score=[0.5]))
    before = history_of(state, 0)
    state.compare_and_set(transitions([0], source, S.DORMANT, cause=Cause.REPLANT, epoch=9))
    word = source | S.DORMANT << 8 | Cause.REPLANT << 16
    assert history_of(state, 0) == [*before, (word, 9)]
    assert state.generation.tolist() == [1]
    for name in ("columns", "metrics", "metrics_valid", "alpha"):
        assert same_bits(state.get_buffer(name), newborn.get_buffer(name))


def test_only_the_cause_makes_the_way_back_to_dormant_a_new_generation() -> None:
    state = ExtendedStateTensor(2)
    walk(state, [0, 1], S.CANCELLED)
    batch = transitions([0, 1], S.CANCELLED, [S.DORMANT, S.GERMINATED], cause=[1, Cause.REPLANT])
    assert state.compare_and_set(batch)[1].tolist() == [Refusal.TERMINAL] * 2


def test_a_request_of_the_generation_before_is_refused() -> None:
    state = ExtendedStateTensor(1)
    walk(state, [0], S.CANCELLED)
    state.compare_and_set(transitions([0], S.CANCELLED, S.DORMANT, cause=Cause.REPLANT))
    late = transitions([0], S.DORMANT, S.GERMINATED)
    assert state.compare_and_set(late)[1].tolist() == [Refusal.STALE_GENERATION]
    late.expected_generation[:] = 1
    assert state.compare_and_set(late)[1].tolist() == [Refusal.NONE]


def test_the_last_generation_is_not_followed_by_a_negative_one() -> None:
    state = ExtendedStateTensor(1)
    walk(state, [0], S.CANCELLED)
    state.generation.fill_(2**15 - 2)
    state.changed()
    for generation, expected in ((2**15 - 2, Refusal.NONE), (2**15 - 1, 15)):
        again = transitions([0], S.CANCELLED, S.DORMANT, generation=generation, cause=4)
        assert state.compare_and_set(again)[1].tolist() == [expected]
        for source, target in pairwise(PATHS[S.CANCELLED]):
            state.compare_and_set(transitions([0], source, target, generation=2**15 - 1))
    assert state.generation.tolist() == [2**15 - 1]


# ---- epochs ----------------------------------------------------------------------------------


def test_lesson_18_epochs_advance_in_every_state_that_is_not_terminal() -> None:
    state = one_of_each()
    advance(state)
    advance(state)
    expected = [2] * 7 + [0] * 4
    assert state.state_tensor[:, state.EPOCHS_IN_STATE].tolist() == expected
    assert state.view().epochs_in_state.tolist() == expected


def test_only_grafting_seeds_take_a_new_alpha() -> None:
    state = one_of_each()
    advance(state)
    assert state.alpha.tolist() == [0, 0, 0, 0.25, 1, 1, 1, 1, 0, 0, 0]
    assert state.view().alpha.tolist() == state.alpha.tolist()


def test_epochs_in_state_saturate() -> None:
    state = ExtendedStateTensor(1)
    state.columns[state.EPOCHS_IN_STATE] = 2**31 - 2
    for _ in range(3):
        advance(state)
    assert int(state.columns[state.EPOCHS_IN_STATE]) == 2**31 - 1


@pytest.mark.parametrize("ids", [[], [3], [3, 2], [2, 3, 4], [2, 2]])
def test_signals_of_other_seeds_are_refused_and_change_nothing(ids: list[int]) -> None:
    state = ExtendedStateTensor(5)
    walk(state, [2, 3], S.GRAFTING)
    before = copy.deepcopy(state)
    with pytest.raises(ValueError, match="not those of the seeds in GRAFTING"):
        state.advance(signals(ids), LINEAR)
    assert same_state(state, before)


def test_lesson_25_each_strategy_gives_an_alpha_of_its_own() -> None:
    state = ExtendedStateTensor(5)
    for seed_id in range(5):
        batch = transitions([seed_id], S.DORMANT, S.GERMINATED, strategy=seed_id, blueprint_id=0)
        state.compare_and_set(batch)
    for source, target in ((S.GERMINATED, S.TRAINING), (S.TRAINING, S.GRAFTING)):
        state.compare_and_set(transitions(range(5), source, target))
    settings = GraftingSettings(ramp_epochs=10, check_every=1, pause_epochs=1)
    traces = []
    for drift in (0.006, 0.0, 0.02, 0.0):
        seen = signals(
            range(5),
            weight_drift=drift,
            performance_delta=0.03,
            loss_variance=1.0,
            gradient_norm=1.0,
            accuracy_variance=0.0,
        )
        state.advance(seen, settings)
        traces.append(state.alpha.tolist())
    assert len(set(zip(*traces, strict=True))) == 5


def test_lesson_25_a_seed_that_grafts_again_remembers_nothing() -> None:
    state = ExtendedStateTensor(1)
    walk(state, [0], S.GRAFTING)
    state.record(metrics([0], score=[0.5]))
    state.grafting["pause"][:] = 7
    state.compare_and_set(transitions([0], S.GRAFTING, S.ROLLED_BACK))
    assert len(state.grafting) == 0
    state.compare_and_set(transitions([0], S.ROLLED_BACK, S.DORMANT, cause=Cause.REPLANT))
    for source, target in pairwise(PATHS[S.GRAFTING]):
        batch = transitions([0], source, target, generation=1, blueprint_id=0)
        state.compare_and_set(batch)
    assert state.grafting["pause"].tolist() == [0]
    assert np.isnan(state.grafting["performance_delta"]).all()


@pytest.mark.parametrize("cause", [-1, 5, 99, 70_000])
def test_a_cause_that_does_not_exist_is_refused_and_other_rows_are_applied(cause: int) -> None:
    state = ExtendedStateTensor(2)
    batch = transitions([0, 1], S.DORMANT, S.GERMINATED, cause=[cause, Cause.USER])
    applied, reason = state.compare_and_set(batch)
    assert applied.tolist() == [False, True]
    assert reason.tolist() == [Refusal.UNKNOWN_CAUSE, Refusal.NONE]


def test_a_seed_without_a_blueprint_cannot_enter_a_state_that_needs_one() -> None:
    state = ExtendedStateTensor(2)
    state.compare_and_set(transitions([0, 1], S.DORMANT, S.GERMINATED, blueprint_id=[-1, 0]))
    applied, reason = state.compare_and_set(transitions([0, 1], S.GERMINATED, S.TRAINING))
    assert applied.tolist() == [False, True]
    assert reason.tolist() == [Refusal.NO_BLUEPRINT, Refusal.NONE]
    later = transitions([0], S.GERMINATED, S.TRAINING, blueprint_id=4)
    assert state.compare_and_set(later)[0].all()
    assert state.columns[state.BLUEPRINT_ID].tolist() == [4, 0]
