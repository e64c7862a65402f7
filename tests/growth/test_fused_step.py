"""A layer whose seeds are stepped by the kernel, run by Triton's interpreter, as by plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from esper_ray.events.messages import TelemetryBatch
from esper_ray.growth.spec import StageSpec
from esper_ray.growth.stage import Stage
from esper_ray.layers import LayerSeeds
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.seeds import bank
from tests.builders import move, run_step, same_bits, stage_spec, walk


def fused(spec: StageSpec) -> Stage:
    stage = Stage(spec)
    for trainer in stage.trainers.values():
        trainer.layer.step_kernel = "triton"
        trainer.reset_epoch()
    return stage


def layer_of(stage: Stage) -> LayerSeeds:
    [trainer] = stage.trainers.values()
    return trainer.layer


def epoch(stage: Stage, number: int) -> TelemetryBatch:
    for _ in range(stage.spec.epoch_steps):
        run_step(stage)
    [seen] = stage.end_epoch(number).telemetry
    return seen


def live(stage: Stage) -> list[TelemetryBatch]:
    """Seeds that train, fail, graft, stand still and end."""
    layer, seen = layer_of(stage), [epoch(stage, 0)]
    walk(stage, [2, 1], S.TRAINING)
    walk(stage, [0], S.STABILIZATION)
    seen.append(epoch(stage, 1))
    with torch.no_grad():
        layer.bank.weights["w_in"][layer.bank.slots(torch.tensor([2]))] = math.nan
    move(stage, [1], S.TRAINING, S.GRAFTING)
    move(stage, [0], S.STABILIZATION, S.EVALUATING)
    seen.extend(epoch(stage, number) for number in (2, 3))
    move(stage, [2], S.TRAINING, S.CANCELLED)
    seen.append(epoch(stage, 4))
    return seen


def weights(stage: Stage) -> dict[str, Tensor]:
    return layer_of(stage).bank.tensors()


def test_seeds_live_as_they_do_in_plain_torch(
    spec: StageSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank, "FIRST_SLOTS", 1)
    ours, plain = fused(spec), Stage(spec)
    for one, other in zip(live(ours), live(plain), strict=True):
        assert one.errors.tolist() == other.errors.tolist()
        assert one.error_count.tolist() == other.error_count.tolist()
        for name in ("gradient_norm", "weight_drift"):
            found, right = (getattr(each.signals, name).tolist() for each in (one, other))
            assert found == pytest.approx(right, rel=1e-3, nan_ok=True)
    assert weights(ours)["step_count"].tolist() == weights(plain)["step_count"].tolist()
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(ours)[name], value, rtol=1e-3, atol=1e-5)


def test_a_step_without_gradients_moves_nothing() -> None:
    stage = fused(stage_spec())
    walk(stage, [1], S.TRAINING)
    before = {name: value.clone() for name, value in weights(stage).items()}
    [trainer] = stage.trainers.values()
    trainer.begin_step()
    trainer.step()
    assert all(same_bits(before[name], value) for name, value in weights(stage).items())


def test_a_step_that_the_kernel_did_not_take_leaves_no_trace_in_later_norms() -> None:
    ours, plain = fused(stage_spec()), Stage(stage_spec())
    for stage in (ours, plain):
        walk(stage, [1], S.GRAFTING)
        epoch(stage, 0)
        [trainer] = stage.trainers.values()
        trainer.begin_step()
        trainer.step()
    one, other = (epoch(stage, 1).signals.gradient_norm.tolist() for stage in (ours, plain))
    assert one == pytest.approx(other, rel=1e-3)
    assert one[0] > 0


def test_weights_that_were_loaded_are_those_that_are_stepped() -> None:
    ours, plain = fused(stage_spec()), Stage(stage_spec())
    for stage in (ours, plain):
        walk(stage, [1], S.TRAINING)
        run_step(stage)
        stage.module.load_state_dict(stage.module.state_dict())
        run_step(stage)
        run_step(stage)
    assert weights(ours)["step_count"].tolist() == [0, 3, 0, 0]
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(ours)[name], value, rtol=1e-3, atol=1e-5)
