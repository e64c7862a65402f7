"""One seed seen as an agent: what it shows is its layer's row, and nothing is its own."""

from __future__ import annotations

import copy
from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from esper_ray.errors import ConfigError
from esper_ray.layers import ChunkedKasminaLayer
from esper_ray.lifecycle import ACTIONS, Cause, LifecycleManager, Refusal, StateTransition
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.seeds import HistoryEntry, LogicalSeed
from tests.builders import PATHS, metrics, move, randomise, same_bits, transitions, walk
from tests.seeds.histories import (
    FIXED,
    SEEDS,
    Happening,
    begin,
    happen,
    histories,
    history_of,
    starts,
)

WIDTH = 12


def layer(**given: object) -> ChunkedKasminaLayer:
    torch.manual_seed(0)
    return ChunkedKasminaLayer(nn.Linear(3, WIDTH), num_seeds=SEEDS, **given)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(to=starts, drawn=histories)
def test_a_seed_shows_its_row_after_any_history(to: list[S], drawn: list[Happening]) -> None:
    host = layer()
    begin(host.state, to)
    seeds = [host.seed(number) for number in range(SEEDS)]
    for happening in drawn:
        happen(host.state, happening, FIXED)
    view, state = host.state.view(), host.state
    for number, seed in enumerate(seeds):
        assert seed.state == view.state[number]
        assert seed.generation == view.generation[number]
        assert seed.alpha == view.alpha[number]
        assert seed.epochs_in_state == view.epochs_in_state[number]
        blueprint = int(state.state_tensor[number, state.BLUEPRINT_ID])
        assert seed.blueprint_id == (blueprint if blueprint >= 0 else None)
        told = [(e.source | e.target << 8 | e.cause << 16, e.epoch) for e in seed.history]
        assert told == history_of(state, number)
        assert seed.telemetry()["error_count"] == view.error_count[number]


def test_a_seed_has_no_state_of_its_own() -> None:
    host = layer()
    seed = host.seed(2)
    assert [field.name for field in fields(LogicalSeed)] == ["host", "seed_id"]
    assert seed == LogicalSeed(host, 2)
    assert (seed.state, seed.blueprint_id, seed.history) == (S.DORMANT, None, [])
    walk(host, [2], S.STABILIZATION)
    assert (seed.state, seed.blueprint_id, seed.alpha) == (S.STABILIZATION, 0, 1.0)


@pytest.mark.parametrize("seed_id", [-1, SEEDS, 10**9])
def test_lesson_12_an_unknown_seed_is_an_error(seed_id: int) -> None:
    with pytest.raises(IndexError, match=f"seed {seed_id} is not in 0..4"):
        layer().seed(seed_id)


def test_the_chunk_of_a_seed_is_a_view() -> None:
    host, x = layer(), torch.zeros(2, WIDTH)
    for number in range(SEEDS):
        seed = host.seed(number)
        assert seed.bounds == host.chunks.bounds(number)
        seed.chunk(x).fill_(number + 1.0)
    assert x[0].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 5]


def test_user_given_chunks_are_those_of_the_seeds() -> None:
    host = layer(chunk_sizes=(1, 7, 2, 1, 1))
    assert [host.seed(i).bounds for i in range(SEEDS)] == [
        (0, 1),
        (1, 8),
        (8, 10),
        (10, 11),
        (11, 12),
    ]


# ---- history and telemetry -------------------------------------------------------------------


def test_history_names_states_causes_and_epochs_oldest_first() -> None:
    host = layer()
    for number, (source, target) in enumerate(pairwise(PATHS[S.ROLLED_BACK])):
        batch = transitions(
            [1], source, target, cause=Cause.TIMEOUT, epoch=10 + number, blueprint_id=0
        )
        assert host.state.compare_and_set(batch)[0].all()
    again = transitions([1], S.ROLLED_BACK, S.DORMANT, cause=Cause.REPLANT, epoch=99)
    assert host.state.compare_and_set(again)[0].all()
    assert host.seed(1).history == [
        HistoryEntry(S.DORMANT, S.GERMINATED, Cause.TIMEOUT, 10),
        HistoryEntry(S.GERMINATED, S.TRAINING, Cause.TIMEOUT, 11),
        HistoryEntry(S.TRAINING, S.GRAFTING, Cause.TIMEOUT, 12),
        HistoryEntry(S.GRAFTING, S.ROLLED_BACK, Cause.TIMEOUT, 13),
        HistoryEntry(S.ROLLED_BACK, S.DORMANT, Cause.REPLANT, 99),
    ]
    assert host.seed(0).history == []


def test_history_keeps_the_last_ten() -> None:
    host = layer()
    for generation in range(7):
        for source, target, cause in (
            (S.DORMANT, S.GERMINATED, Cause.POLICY),
            (S.GERMINATED, S.CANCELLED, Cause.USER),
            (S.CANCELLED, S.DORMANT, Cause.REPLANT),
        ):
            batch = transitions(
                [0], source, target, generation=generation, cause=cause, epoch=generation
            )
            assert host.state.compare_and_set(batch)[0].all()
    assert [entry.epoch for entry in host.seed(0).history] == [3, 4, 4, 4, 5, 5, 5, 6, 6, 6]
    assert host.seed(0).generation == 7


def test_lesson_26_telemetry_leaves_out_what_was_not_measured() -> None:
    host = layer()
    counts = {"epochs_in_state": 0, "alpha": 0.0, "error_count": 0, "evaluation_score": 0.0}
    assert host.seed(1).telemetry() == counts
    host.state.record(metrics([1], [[0.5, 0.0, 0.25, 9.0]], valid=[0b0111], score=[-0.65]))
    host.state.count_errors(torch.tensor([False, True, False, False, False]))
    measured = {"loss": 0.5, "accuracy": 0.0, "stability": 0.25}
    errors = {"error_count": 1, "evaluation_score": -0.65}
    assert host.seed(1).telemetry() == counts | errors | measured
    assert host.seed(0).telemetry() == counts


# ---- isolation -------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(seed_id=st.integers(0, SEEDS - 1), goal=st.sampled_from([s for s in S if s != S.DORMANT]))
def test_what_is_done_to_one_seed_changes_no_other_row_weight_or_output(
    seed_id: int, goal: S
) -> None:
    host, x = layer(), torch.randn(6, 3)
    walk(host, [number for number in range(SEEDS) if number != seed_id], S.STABILIZATION)
    randomise(host)
    others = [number for number in range(SEEDS) if number != seed_id]
    before, output = copy.deepcopy(host), host(x)
    walk(host, [seed_id], goal)
    host.state.record(metrics([seed_id], [[1, 2, 3, 4]], valid=[15], score=[0.5]))
    for name in ("columns", "metrics", "alpha", "generation", "history", "transition_count"):
        now, then = host.state.get_buffer(name), before.state.get_buffer(name)
        assert same_bits(now[..., others], then[..., others])
    for name, value in host.bank.tensors().items():
        assert same_bits(value[others], before.bank.tensors()[name][others])
    for number in others:
        chunk = host.seed(number).chunk
        # The order of sums in a batched product depends on the size of the batch.
        assert torch.allclose(chunk(host(x)), chunk(output), rtol=1e-5, atol=1e-6)


# ---- requests --------------------------------------------------------------------------------


def eager(**given: object) -> LifecycleManager:
    return LifecycleManager(minimum_epochs={}, **given)  # type: ignore[arg-type]


def test_a_seed_germinates_when_asked_and_not_twice() -> None:
    seed = layer().seed(3)
    assert seed.request("germinate") is Refusal.NONE
    assert (seed.state, seed.blueprint_id) == (S.GERMINATED, 0)
    assert seed.history[0].cause is Cause.USER
    assert seed.request("germinate") is Refusal.NOT_IN_TABLE
    assert seed.request("cancel") is Refusal.NONE
    assert (seed.state, seed.blueprint_id) == (S.CANCELLED, None)
    assert seed.request("germinate") is Refusal.TERMINAL


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("state", list(S))
def test_a_request_is_made_where_table_and_replanting_allow_it(action: str, state: S) -> None:
    host = layer()
    host.manager = eager(replanting=True)
    walk(host, [1], state)
    target, _ = ACTIONS[action]
    allowed = target in StateTransition.VALID_TRANSITIONS[state]
    if action == "replant":
        allowed = state in (S.CULLED, S.CANCELLED, S.ROLLED_BACK)
    gated = (state, target) == (S.EVALUATING, S.CULLED)
    refusal = host.seed(1).request(action)
    assert (refusal is Refusal.NONE) == (allowed and not gated)
    assert host.seed(1).state == (target if allowed and not gated else state)
    assert (refusal is Refusal.GATE) == gated


def test_a_seed_is_replanted_only_where_that_is_on() -> None:
    host = layer()
    walk(host, [0], S.CANCELLED)
    assert host.seed(0).request("replant") is Refusal.REPLANTING_OFF
    host.manager = LifecycleManager(replanting=True)
    assert host.seed(0).request("replant") is Refusal.NONE
    assert (host.seed(0).state, host.seed(0).generation) == (S.DORMANT, 1)


def test_a_user_cannot_cull_before_the_minimum_has_passed() -> None:
    host = layer()
    walk(host, [0], S.TRAINING)
    assert host.seed(0).request("cull") is Refusal.TOO_EARLY
    assert host.seed(0).state is S.TRAINING
    assert host.seed(0).request("cancel") is Refusal.NONE


def test_a_layer_answers_every_row_of_a_request() -> None:
    host = layer()
    move(host, [2], S.DORMANT, S.GERMINATED)
    asked = [0, -1, 2, 1, 1, SEEDS]
    assert host.request("germinate", asked) == [
        Refusal.NONE,
        Refusal.UNKNOWN_SEED,
        Refusal.NOT_IN_TABLE,
        Refusal.DUPLICATE_SEED,
        Refusal.DUPLICATE_SEED,
        Refusal.UNKNOWN_SEED,
    ]
    assert host.state.lifecycle_state.tolist() == [1, 0, 1, 0, 0]
    assert host.request("germinate", []) == []


def test_an_action_that_does_not_exist_lists_those_that_do() -> None:
    with pytest.raises(ConfigError, match="no action is named 'water'") as caught:
        layer().seed(0).request("water")
    assert all(action in caught.value.hint for action in ACTIONS)


def test_a_rolled_back_seed_has_the_weights_from_before_it_grafted() -> None:
    host = layer()
    walk(host, [1], S.TRAINING)
    randomise(host)
    kept = {name: weight[1].clone() for name, weight in host.bank.weights.items()}
    move(host, [1], S.TRAINING, S.GRAFTING)
    randomise(host, seed=1)
    assert host.seed(1).request("rollback") is Refusal.NONE
    for name, weight in host.bank.weights.items():
        assert same_bits(weight[1].detach(), kept[name].detach())
    assert np.array_equal(host.state.view().alpha, np.zeros(SEEDS, np.float32))
