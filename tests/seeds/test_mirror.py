"""Host faces that are copies, as beside a device: they and the buffers always agree.

The device is a pretence: buffers stay on the CPU, but faces are copies and changes are sent.
"""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_ray.grafting import GraftingSettings
from esper_ray.layers import ChunkedKasminaLayer
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.seeds import ExtendedStateTensor
from esper_ray.seeds.mirror import Latch, MirroredBuffers
from tests.builders import same_bits, transitions, walk
from tests.seeds.histories import (
    FIXED,
    SEEDS,
    SWITCHING,
    Happening,
    begin,
    happen,
    histories,
    same_state,
    starts,
)


class DeviceStateTensor(ExtendedStateTensor):
    """Behaves as on a device."""

    @property
    def mirrored(self) -> bool:
        return True


def faces_agree(state: ExtendedStateTensor) -> bool:
    return all(
        same_bits(torch.from_numpy(np.ascontiguousarray(state.host(name))), buffer)
        and not np.shares_memory(state.host(name), buffer.numpy())
        for name, buffer in state.named_buffers()
    )


@settings(max_examples=100, deadline=None)
@given(to=starts, drawn=histories, rules=st.sampled_from([FIXED, SWITCHING]))
def test_buffers_equal_their_faces_and_those_of_a_run_without_copies(
    to: list[S], drawn: list[Happening], rules: GraftingSettings
) -> None:
    device, plain = DeviceStateTensor(SEEDS), ExtendedStateTensor(SEEDS)
    begin(device, to)
    begin(plain, to)
    for happening in drawn:
        assert happen(device, happening, rules) == happen(plain, happening, rules)
        assert faces_agree(device)
        assert same_state(device, plain)


@pytest.mark.parametrize("kind", [ExtendedStateTensor, DeviceStateTensor])
def test_errors_counted_on_the_device_outlive_the_next_transition(
    kind: type[ExtendedStateTensor],
) -> None:
    state = kind(2)
    walk(state, [0], S.TRAINING)
    state.count_errors(torch.tensor([True, True]))
    walk_on = transitions([0], S.TRAINING, S.GRAFTING)
    assert state.compare_and_set(walk_on)[0].all()
    assert state.columns[state.ERROR_COUNT].tolist() == [1, 1]
    assert state.view().error_count.tolist() == [1, 1]


def test_a_device_copy_of_some_rows_leaves_the_others_alone() -> None:
    state = DeviceStateTensor(4)
    state.columns[state.ERROR_COUNT, 3] = 7  # written on the device alone
    walk(state, [0, 2], S.TRAINING)
    assert state.columns[state.ERROR_COUNT].tolist() == [0, 0, 0, 7]
    assert state.fetch("columns")[state.ERROR_COUNT].tolist() == [0, 0, 0, 7]


def test_on_the_cpu_a_face_is_the_buffer_itself() -> None:
    state = ExtendedStateTensor(3)
    for name, buffer in state.named_buffers():
        assert np.shares_memory(state.host(name), buffer.numpy())
        assert np.shares_memory(state.fetch(name), buffer.numpy())


@pytest.mark.parametrize("kind", [ExtendedStateTensor, DeviceStateTensor])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_has_faces_of_its_own(kind: type[ExtendedStateTensor], way: object) -> None:
    state = kind(2)
    walk(state, [0], S.GRAFTING)
    state.view()
    assert callable(way)
    twin = way(state)
    assert same_state(state, twin)
    walk(state, [1], S.TRAINING)
    walk(twin, [1], S.STABILIZATION)
    assert (state.view().state.tolist(), twin.view().state.tolist()) == ([3, 2], [3, 4])
    assert twin.lifecycle_state.tolist() == [3, 4]


def test_a_loaded_state_replaces_the_faces() -> None:
    state, trained = DeviceStateTensor(1), ExtendedStateTensor(1)
    walk(trained, [0], S.TRAINING)
    assert state.host("columns")[0].tolist() == [0]
    state.load_state_dict(trained.state_dict())
    assert state.host("columns")[0].tolist() == [2]
    assert faces_agree(state)


def test_buffers_that_one_part_holds_as_none_have_no_face() -> None:
    holder = MirroredBuffers()
    holder.register_buffer("numbers", torch.arange(3))
    holder.register_buffer("nothing", None)
    with pytest.raises(AttributeError, match="no buffer is named 'nothing'"):
        holder.host("nothing")
    assert holder.half().host("numbers").tolist() == [0, 1, 2]


def test_a_single_seed_sees_what_the_device_counted() -> None:
    layer = ChunkedKasminaLayer(torch.nn.Linear(2, 4), num_seeds=2)
    layer.state = DeviceStateTensor(2)
    assert layer.seed(1).telemetry()["error_count"] == 0
    layer.state.count_errors(torch.tensor([False, True]))
    assert layer.seed(1).telemetry()["error_count"] == 1


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_latch_copies_as_a_new_open_one(way: object) -> None:
    latch = Latch()
    assert callable(way)
    with latch:
        twin = way(latch)
        with twin:
            assert twin is not latch
    with latch, twin:
        pass
