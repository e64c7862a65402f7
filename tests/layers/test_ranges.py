"""What seeds do is named in a profile, and costs nothing outside of one."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from esper_ray.growth.stage import Stage
from esper_ray.layers.ranges import profiled
from esper_ray.lifecycle import ExtendedLifecycle as S
from tests.builders import run_step, stage_spec, walk

LAYER = "model.0.hidden.0"


def test_a_profile_of_two_steps_names_what_the_seeds_of_a_layer_do() -> None:
    stage = Stage(stage_spec())
    walk(stage, [0], S.TRAINING)
    walk(stage, [1], S.STABILIZATION)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        run_step(stage)
        run_step(stage)
        stage.end_epoch(1)
    counts = {event.key: event.count for event in trace.key_averages()}
    batches = 2 * stage.spec.data.micro_batches
    assert counts[f"esper_ray/{LAYER}/blend"] == batches
    assert counts[f"esper_ray/{LAYER}/listen"] == batches
    assert counts[f"esper_ray/{LAYER}/train"] == 2
    assert counts[f"esper_ray/{LAYER}/step"] == 2
    assert counts[f"esper_ray/{LAYER}/epoch"] == 1


def test_no_range_is_made_while_no_profiler_runs() -> None:
    assert profiled("layer", "blend") is profiled("other", "step")
    with profile(activities=[ProfilerActivity.CPU]):
        assert isinstance(profiled("layer", "blend"), torch.profiler.record_function)
