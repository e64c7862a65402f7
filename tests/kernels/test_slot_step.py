"""The fused step, run by Triton's interpreter on a CPU, against float64."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_ray.blueprints import BlueprintShape
from esper_ray.growth.slot_adam import SlotAdamSettings
from tests.kernels.cases import FUSED
from tests.kernels.step_cases import StepCase, check

SIZES = [0.0, 1e-3, 0.3, 50.0, math.nan, math.inf, -math.inf]


@st.composite
def cases(draw: st.DrawFn) -> StepCase:
    slots = draw(st.integers(1, 6))
    listed = draw(st.lists(st.integers(0, slots - 1), min_size=1, unique=True))
    moves = torch.zeros(slots, dtype=torch.bool)
    moves[[slot for slot in listed if draw(st.booleans())]] = True
    row = st.lists(st.sampled_from(SIZES), min_size=slots, max_size=slots)
    chunk, hidden = draw(st.sampled_from([(1, 1), (3, 5), (16, 8), (40, 37)]))
    return StepCase(
        name=draw(st.sampled_from([*FUSED, "affine"])),
        shape=BlueprintShape(chunk, hidden, draw(st.integers(1, 9))),
        settings=SlotAdamSettings(
            lr=0.02,
            warmup_steps=draw(st.sampled_from([0, 1, 10])),
            clip_norm=draw(st.sampled_from([0.1, 1.0, math.inf])),
        ),
        listed=torch.tensor(listed),
        moves=moves,
        faults=torch.tensor(draw(st.lists(st.booleans(), min_size=slots, max_size=slots))),
        gradients=torch.tensor(draw(st.lists(row, min_size=1, max_size=3))),
        seed=draw(st.integers(0, 2**31)),
    )


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_the_kernel_steps_like_float64(case: StepCase) -> None:
    assert check(case) < 1


def test_a_seed_may_be_larger_than_all_programs_of_it_take_at_once() -> None:
    moves = torch.tensor([True, False, True])
    case = StepCase(
        "bottleneck",
        BlueprintShape(300, 230, 0),
        SlotAdamSettings(),
        torch.tensor([2, 0]),
        moves,
        torch.zeros(3, dtype=torch.bool),
        torch.tensor([[1.0, 1.0, 0.01]]),
    )
    assert check(case) < 1
