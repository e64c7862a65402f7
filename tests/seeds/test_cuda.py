"""The state on a GPU: what the pretended device of test_mirror.py stands for."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_ray.grafting import GraftingSettings
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.seeds import ExtendedStateTensor
from tests.builders import walk
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

pytestmark = pytest.mark.gpu


@settings(max_examples=100, deadline=None)
@given(to=starts, drawn=histories, rules=st.sampled_from([FIXED, SWITCHING]))
def test_a_state_on_a_gpu_goes_the_way_of_one_on_the_cpu(
    to: list[S], drawn: list[Happening], rules: GraftingSettings
) -> None:
    device, plain = ExtendedStateTensor(SEEDS, "cuda"), ExtendedStateTensor(SEEDS)
    begin(device, to)
    begin(plain, to)
    for happening in drawn:
        assert happen(device, happening, rules) == happen(plain, happening, rules)
        assert same_state(copy.deepcopy(device).to("cpu"), plain)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_counting_errors_never_waits_for_the_gpu() -> None:
    state = ExtendedStateTensor(4, "cuda")
    walk(state, [0], S.TRAINING)
    failed = torch.tensor([True, False, False, True], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        state.count_errors(failed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.view().error_count.tolist() == [1, 0, 0, 1]
