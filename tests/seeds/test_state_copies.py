"""The state of seeds saved, loaded, copied, moved and cast: nothing is lost, nothing shared."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from esper_ray.grafting import GraftingMemory
from esper_ray.layers import ChunkedKasminaLayer
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.seeds import ExtendedStateTensor
from tests.builders import metrics, signals, transitions, walk
from tests.seeds.histories import (
    SEEDS,
    SWITCHING,
    Happening,
    begin,
    happen,
    histories,
    same_state,
    starts,
)

Way = Callable[[ExtendedStateTensor], ExtendedStateTensor]


def loaded(state: ExtendedStateTensor) -> ExtendedStateTensor:
    other = ExtendedStateTensor(state.num_seeds)
    other.view()
    other.load_state_dict(copy.deepcopy(state.state_dict()))
    return other


def pickled(state: ExtendedStateTensor) -> ExtendedStateTensor:
    other: ExtendedStateTensor = pickle.loads(pickle.dumps(state))
    return other


def cast(dtype: torch.dtype) -> Way:
    return lambda state: copy.deepcopy(state).to(dtype)


WAYS: dict[str, Way] = {
    "load_state_dict": loaded,
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "to cpu": lambda state: copy.deepcopy(state).to("cpu"),
    "half": lambda state: copy.deepcopy(state).half(),
    "bfloat16": lambda state: copy.deepcopy(state).bfloat16(),
    "double": lambda state: copy.deepcopy(state).double(),
    "to cpu and float64": lambda state: copy.deepcopy(state).to("cpu", torch.float64),
    "half and back": lambda state: copy.deepcopy(state).half().float(),
    "a larger model": lambda state: nn.ModuleList([copy.deepcopy(state)]).half()[0],  # type: ignore[dict-item, return-value]
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@settings(max_examples=12, deadline=None)
@given(to=starts, before=histories, after=histories)
def test_lesson_38_a_copy_holds_everything_goes_on_alike_and_lives_apart(
    way: Way, to: list[S], before: list[Happening], after: list[Happening]
) -> None:
    state = ExtendedStateTensor(SEEDS)
    begin(state, to)
    for happening in before:
        happen(state, happening, SWITCHING)
    kept, twin = copy.deepcopy(state), way(state)
    assert same_state(twin, state)
    assert twin.view().state.tolist() == state.view().state.tolist()
    for happening in after:
        happen(twin, happening, SWITCHING)
    assert same_state(state, kept)
    for happening in after:
        happen(state, happening, SWITCHING)
    assert same_state(twin, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_buffers_keep_their_dtype_and_their_values_when_a_model_is_cast(dtype: torch.dtype) -> None:
    layer = ChunkedKasminaLayer(nn.Linear(4, 6), num_seeds=3)
    walk(layer, [1], S.GRAFTING)
    layer.state.record(metrics([1], [[0.1, 0.2, 0.3, 1e30]], valid=[15], score=[0.65]))
    dtypes = {name: buffer.dtype for name, buffer in layer.state.named_buffers()}
    before = copy.deepcopy(layer.state)
    nn.Sequential(layer).to(dtype)
    assert {name: b.dtype for name, b in layer.state.named_buffers()} == dtypes
    assert same_state(layer.state, before)
    assert layer.host_parameters()[0].dtype == dtype


def test_a_state_moves_to_another_device_with_its_dtypes() -> None:
    state = ExtendedStateTensor(2)
    dtypes = [buffer.dtype for buffer in state.buffers()]
    moved = copy.deepcopy(state).to("meta", torch.float16)
    assert {buffer.device.type for buffer in moved.buffers()} == {"meta"}
    assert [buffer.dtype for buffer in moved.buffers()] == dtypes
    assert moved.mirrored
    assert ExtendedStateTensor(2, device="meta").columns.is_meta


def test_lesson_38_a_state_dict_names_every_buffer_and_what_grafting_remembers() -> None:
    state = ExtendedStateTensor(2)
    walk(state, [1], S.GRAFTING)
    saved = state.state_dict()
    buffers = {name for name, _ in state.named_buffers()}
    assert set(saved) == buffers | {"_extra_state"}
    assert saved["_extra_state"].dtype == torch.uint8
    assert 0 < saved["_extra_state"].nbytes <= GraftingMemory.BYTES_PER_ROW


def test_lesson_38_what_grafting_remembers_is_saved_as_a_copy() -> None:
    state = ExtendedStateTensor(2)
    walk(state, [1], S.GRAFTING)
    saved = state.state_dict()
    state.grafting["pause"][:] = 9
    state.load_state_dict(saved)
    assert state.grafting["pause"].tolist() == [0]


def test_lesson_14_a_loaded_state_is_the_one_that_transitions_meet() -> None:
    model, trained = (
        nn.Sequential(ChunkedKasminaLayer(nn.Linear(2, 4), num_seeds=2)) for _ in range(2)
    )
    for part in (model[0], trained[0]):
        assert isinstance(part, ChunkedKasminaLayer)
    walk(trained[0], [0], S.TRAINING)  # type: ignore[arg-type]
    state = model[0].state
    assert isinstance(state, ExtendedStateTensor)
    state.view()
    model.load_state_dict(trained.state_dict())
    assert state.view().state.tolist() == [2, 0]
    applied, _ = state.compare_and_set(transitions([0], S.TRAINING, S.GRAFTING))
    assert applied.tolist() == [True]


def test_a_state_in_shared_memory_is_the_same_state() -> None:
    state = ExtendedStateTensor(2)
    walk(state, [0], S.GRAFTING)
    before = copy.deepcopy(state)
    state.share_memory()
    assert same_state(state, before)
    walk(state, [1], S.TRAINING)
    assert state.lifecycle_state.tolist() == [3, 2]


def test_apply_visits_every_part_of_a_model_that_has_seeds() -> None:
    model = nn.Sequential(ChunkedKasminaLayer(nn.Linear(4, 6), num_seeds=3), nn.ReLU())
    seen: list[str] = []

    def visit(module: nn.Module) -> None:
        seen.append(type(module).__name__)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)

    assert model.apply(visit) is model
    assert {"ExtendedStateTensor", "ChunkManager", "SeedBank", "Linear", "ReLU"} <= set(seen)
    weight = model[0].base_layer.weight  # type: ignore[union-attr]
    assert isinstance(weight, torch.Tensor)
    assert not weight.any()


def test_the_host_copy_does_not_change_under_its_reader() -> None:
    state = ExtendedStateTensor(2)
    seen = state.view()
    walk(state, [1], S.TRAINING)
    assert seen.state.tolist() == [0, 0]
    assert state.view().rows(S.TRAINING, S.DORMANT).tolist() == [0, 1]
    assert state.view().rows(S.TRAINING).tolist() == [1]


def test_the_host_copy_is_made_once_per_change() -> None:
    state = ExtendedStateTensor(2)
    assert state.view() is state.view()
    seen = state.view()
    state.advance(signals([]), SWITCHING)
    assert state.view() is not seen


@pytest.mark.parametrize("number", [10, 1_000])
def test_a_seed_costs_less_than_150_bytes(number: int) -> None:
    state = ExtendedStateTensor(number)
    assert sum(buffer.nbytes for buffer in state.buffers()) / number < 150


def test_grafting_costs_its_rows_only() -> None:
    state = ExtendedStateTensor(1_000)
    walk(state, [7, 900], S.GRAFTING)
    remembered = state.grafting.arrays()
    assert {len(column) for column in remembered.values()} == {2}
    assert sum(column.nbytes for column in remembered.values()) <= 2 * GraftingMemory.BYTES_PER_ROW
    assert np.array_equal(remembered["seed_id"], [7, 900])


@given(st.sampled_from(list(S)))
def test_a_state_loaded_twice_is_loaded_once(goal: S) -> None:
    state = ExtendedStateTensor(2)
    walk(state, [1], goal)
    twin = loaded(state)
    twin.load_state_dict(state.state_dict())
    assert same_state(twin, state)
