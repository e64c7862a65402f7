"""A stage trains its host as if the seeds were not there, and only the seeds that may move."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from esper_ray.data import ByteSplit
from esper_ray.errors import ConfigError
from esper_ray.events import EvaluationRequest
from esper_ray.growth import seed_trainer
from esper_ray.growth.slot_adam import SlotAdamSettings
from esper_ray.growth.spec import SeedSpec, StageSpec
from esper_ray.growth.stage import Stage
from esper_ray.layers import LayerSeeds
from esper_ray.lifecycle import STEPPED_STATES
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.seeds import bank
from tests.builders import (
    PATHS,
    data_spec,
    host_gradients,
    metrics,
    move,
    run_step,
    same_bits,
    stage_spec,
    transitions,
    walk,
)

TWO_STAGES = "esper_ray.models:byte_mlp"


def host_of(stage: Stage) -> nn.Module:
    return stage.module.get_submodule(stage.spec.layers[0].path)


def layer_of(stage: Stage) -> LayerSeeds:
    [trainer] = stage.trainers.values()
    return trainer.layer


def everyone(stage: Stage) -> list[int]:
    return list(range(layer_of(stage).state.num_seeds))


def host_weights(stage: Stage) -> dict[str, Tensor]:
    return dict(stage.host_parameters)


def same_dicts(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[n], other[n]) for n in one)


# ---- the host --------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [S.DORMANT, S.GERMINATED, S.TRAINING])
def test_lesson_27_hidden_seeds_change_no_bit_of_the_hosts_training(
    spec: StageSpec, state: S
) -> None:
    stage, bare = Stage(spec), Stage(replace(spec, layers=()))
    walk(stage, everyone(stage), state)
    for _ in range(6):
        assert all(map(same_bits, run_step(stage), run_step(bare)))
        assert len(host_gradients(bare)) == 7
        assert same_dicts(host_gradients(stage), host_gradients(bare))
        assert same_dicts(host_weights(stage), host_weights(bare))
        if stage.step % spec.epoch_steps == 0:
            assert stage.end_epoch(stage.step).losses == bare.end_epoch(bare.step).losses


@pytest.mark.parametrize("state", [S.DORMANT, S.TRAINING])
def test_hidden_seeds_change_no_bit_of_the_input_gradient(spec: StageSpec, state: S) -> None:
    layer = replace(spec.layers[0], layer_id="predictor.hidden.0", path="hidden.0", inputs=8)
    args: dict[str, object] = {"window": 4, "embedding": 3, "hidden": 8}
    second = replace(spec, index=1, count=2, factory=TWO_STAGES, factory_args=args, layers=(layer,))
    stage, bare = Stage(second), Stage(replace(second, layers=()))
    walk(stage, everyone(stage), state)
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        found: list[list[Tensor]] = []
        received = torch.randn(2, 4, 8, generator=generator)
        for one in (stage, bare):
            one.begin_step(step)
            seen: list[Tensor] = []
            for number in range(2):
                seen.append(one.forward(number, received[number]))
                gradient = one.backward(number, None)
                assert gradient is not None
                seen.append(gradient)
            one.finish_step()
            found.append(seen)
        assert all(map(same_bits, *found))
        assert same_dicts(host_gradients(stage), host_gradients(bare))
        assert same_dicts(host_weights(stage), host_weights(bare))


def test_blended_seeds_do_change_the_host(spec: StageSpec) -> None:
    stage, bare = Stage(spec), Stage(replace(spec, layers=()))
    walk(stage, everyone(stage), S.TRAINING)
    for _ in range(3):
        run_step(stage)
        run_step(bare)
    move(stage, everyone(stage), S.TRAINING, S.GRAFTING)
    move(stage, everyone(stage), S.GRAFTING, S.STABILIZATION)
    assert not any(map(same_bits, run_step(stage), run_step(bare)))


# ---- the seeds -------------------------------------------------------------------------------


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of the tensor operations that are run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def operations(stage: Stage) -> list[str]:
    """What the seeds' part of a step runs, after a step of the whole stage."""
    run_step(stage)
    [trainer] = stage.trainers.values()
    found = Operations()
    with found:
        trainer.begin_step()
        trainer.train_seeds()
        trainer.step()
    return found.seen


def test_seeds_that_are_not_at_work_cost_no_operation() -> None:
    stage = Stage(stage_spec())
    assert operations(stage) == []
    walk(stage, [0, 1], S.GERMINATED)
    assert operations(stage) == []
    move(stage, [1], S.GERMINATED, S.TRAINING)
    assert operations(stage) != []
    move(stage, [1], S.TRAINING, S.CANCELLED)
    assert operations(stage) == []


def test_a_fault_of_an_evaluation_is_counted_though_its_seed_is_no_longer_at_work() -> None:
    stage = Stage(stage_spec(epoch_steps=1))
    layer = layer_of(stage)
    walk(stage, [1], S.TRAINING)
    run_step(stage)
    stage.end_epoch(0)
    layer.faults[1] = 1
    move(stage, [1], S.TRAINING, S.CANCELLED)
    run_step(stage)
    [seen] = stage.end_epoch(1).telemetry
    assert seen.errors.tolist() == [0, 1, 0, 0]
    assert not layer.faults.any()


def test_lesson_48_seeds_in_training_learn_and_no_other_row_moves(spec: StageSpec) -> None:
    stage = Stage(spec)
    layer = layer_of(stage)
    walk(stage, [0], S.TRAINING)
    walk(stage, [2], S.TRAINING)
    walk(stage, [1], S.GERMINATED)
    before = {n: v.clone() for n, v in layer.bank.tensors().items()}
    for _ in range(4):
        run_step(stage)
    after = layer.bank.tensors()
    assert layer.bank.step_count[:3].tolist() == [4, 0, 4]
    for name in ("w_out", "b_out"):
        assert (after[name][[0, 2]] != before[name][[0, 2]]).flatten(1).any(1).all()
    assert all(same_bits(after[n][1], before[n][1]) for n in before)


def test_lesson_48_the_local_loss_falls_under_every_objective(
    spec: StageSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_batch = ByteSplit(torch.arange(200, dtype=torch.uint8), 4).take(torch.arange(8))
    monkeypatch.setattr(ByteSplit, "draw", lambda *_: one_batch)
    quick = replace(spec.seeds, optimizer=SlotAdamSettings(lr=0.02, warmup_steps=0))
    stage = Stage(replace(spec, seeds=quick, host_lr=1e-6))
    walk(stage, everyone(stage), S.TRAINING)
    losses = []
    for epoch in range(20):
        for _ in range(spec.epoch_steps):
            run_step(stage)
        [seen] = stage.end_epoch(epoch).telemetry
        losses.append(seen.local_loss)
    assert (losses[-1] < losses[0]).all()


@pytest.mark.parametrize("state", list(S))
def test_lesson_50_weights_move_in_exactly_the_states_that_say_so(state: S) -> None:
    stage = Stage(stage_spec())
    layer = layer_of(stage)
    for source, target in pairwise(PATHS[state]):
        move(stage, [1], source, target)
        if target is S.TRAINING:
            run_step(stage)
            run_step(stage)
    if state == S.GRAFTING:
        stage.end_epoch(0)  # alpha leaves 0, and with it comes the task's gradient
    before = {n: v.clone() for n, v in layer.bank.tensors().items()}
    run_step(stage)
    moved = not same_bits(before["w_out"][1], layer.bank.weights["w_out"][1])
    assert moved == (state in STEPPED_STATES)
    counted = int(layer.bank.step_count[1]) - int(before["step_count"][1])
    assert counted == (state in STEPPED_STATES)


def test_the_host_gets_the_same_gradient_however_the_batch_is_cut() -> None:
    found = []
    for pieces in (1, 2, 8):
        stage = Stage(stage_spec(layers=(), data=data_spec(micro_batches=pieces)))
        run_step(stage)
        found.append((host_gradients(stage), stage.end_epoch(0).losses))
    for gradients, losses in found[1:]:
        assert losses == pytest.approx(found[0][1], rel=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][0][name], rtol=1e-4, atol=1e-7)


def test_a_seed_learns_the_same_whoever_else_is_in_training(spec: StageSpec) -> None:
    alone, together = Stage(spec), Stage(spec)
    walk(alone, [1], S.TRAINING)
    walk(together, everyone(together), S.TRAINING)
    run_step(alone)
    run_step(together)
    for name, weight in layer_of(alone).bank.weights.items():
        other = layer_of(together).bank.weights[name]
        assert weight.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(weight.grad[1], other.grad[1], rtol=1e-5, atol=1e-8)


def test_seeds_get_the_same_gradient_however_the_batch_is_cut(spec: StageSpec) -> None:
    def gradients(pieces: int) -> dict[str, Tensor]:
        stage = Stage(replace(spec, data=data_spec(micro_batches=pieces)))
        walk(stage, everyone(stage), S.TRAINING)
        run_step(stage)
        weights = layer_of(stage).bank.weights
        return {n: w.grad.clone() for n, w in weights.items() if w.grad is not None}

    whole = gradients(1)
    assert whole
    for pieces in (2, 4, 8):
        for name, gradient in gradients(pieces).items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 0, 1]])
def test_a_gradient_that_is_not_a_number_is_counted_and_moves_nothing(
    order: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank, "FIRST_SLOTS", 2)
    stage = Stage(stage_spec())
    layer = layer_of(stage)
    for seed_id in order:
        walk(stage, [seed_id], S.TRAINING)
    assert layer.bank.seed_of_slot.tolist() == order
    run_step(stage)
    one, two = layer.bank.slots(torch.tensor([1, 2])).tolist()
    with torch.no_grad():
        layer.bank.weights["w_in"][two] = math.nan
    before = {n: v.clone() for n, v in layer.bank.tensors().items()}
    bare = Stage(stage_spec(layers=()))
    run_step(bare)
    assert all(map(same_bits, run_step(stage), run_step(bare)))
    assert layer.state.view().error_count.tolist() == [0, 0, 1, 0]
    after = layer.bank.tensors()
    assert all(same_bits(after[n][two], before[n][two]) for n in before)
    assert not same_bits(after["w_out"][one], before["w_out"][one])


def test_telemetry_is_measured_by_hand() -> None:
    spec = stage_spec(data=data_spec(micro_batches=1), epoch_steps=1)
    stage = Stage(spec)
    layer = layer_of(stage)
    walk(stage, [1], S.TRAINING)
    heard: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, out: Tensor) -> None:
        out.retain_grad()
        heard.append(out)

    host_of(stage).register_forward_hook(keep)
    run_step(stage)
    [seen] = stage.end_epoch(0).telemetry
    h = heard[0].detach().view(8, 4, 2)
    assert heard[0].grad is not None
    g = heard[0].grad.view(8, 4, 2)
    assert seen.chunk_mean.tolist() == pytest.approx(h.mean((0, 2)).tolist(), rel=1e-4)
    variance = h.transpose(0, 1).flatten(1).var(1, correction=0)
    assert seen.chunk_variance.tolist() == pytest.approx(variance.tolist(), rel=1e-4)
    strength = g.pow(2).mean((0, 2)).sqrt()
    assert seen.chunk_gradient.tolist() == pytest.approx(strength.tolist(), rel=1e-4)
    scale = h.pow(2).mean().sqrt() / g.pow(2).mean().sqrt()
    newborn = (0.3 * scale * g[:, 1]).pow(2).mean()  # delta is zero at birth
    assert float(seen.local_loss[1]) == pytest.approx(float(newborn), rel=1e-4)
    assert seen.delta_ratio[1] == 0
    assert [math.isnan(x) for x in seen.local_loss] == [True, False, True, True]
    bank, linear = layer.bank, host_of(stage)
    host = sum(linear.get_parameter(name).numel() for name in ("weight", "bias"))
    assert seen.parameter_share == bank.weights_per_seed / host
    assert seen.epochs_in_state.tolist() == [1, 1, 1, 1]


def test_lesson_07_variance_is_right_at_a_large_mean() -> None:
    stage = Stage(stage_spec(epoch_steps=1, data=data_spec(micro_batches=1)))
    heard: list[Tensor] = []
    with torch.no_grad():
        for parameter in host_of(stage).parameters():
            parameter.mul_(0.01)
        host_of(stage).get_parameter("bias").add_(1_000.0)
    host_of(stage).register_forward_hook(lambda _m, _i, out: heard.append(out.detach()))
    run_step(stage)
    [seen] = stage.end_epoch(0).telemetry
    chunks = heard[0].double().view(8, 4, 2).transpose(0, 1).flatten(1)
    expected = chunks.var(1, correction=0).tolist()
    assert max(expected) < 0.01
    assert seen.chunk_variance.tolist() == pytest.approx(expected, rel=1e-2)


def test_drift_is_the_relative_change_per_step() -> None:
    stage = Stage(stage_spec(epoch_steps=2))
    layer = layer_of(stage)
    walk(stage, [1], S.GRAFTING)
    stage.end_epoch(0)  # alpha leaves 0, so the seed moves from here on
    before = torch.cat([w.detach()[1].flatten() for w in layer.bank.weights.values()])
    run_step(stage)
    run_step(stage)
    after = torch.cat([w.detach()[1].flatten() for w in layer.bank.weights.values()])
    read = stage.end_epoch(1).telemetry[0].signals
    expected = float((after - before).norm() / before.norm()) / 2
    assert expected > 0
    assert read.seed_ids.tolist() == [1]
    assert read.weight_drift.tolist() == pytest.approx([expected], rel=1e-5)
    assert read.gradient_norm[0] > 0


def test_slots_that_are_stepped_without_the_others_move_the_same(
    spec: StageSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for worth in (seed_trainer.WORTH_PICKING, 0):
        monkeypatch.setattr(seed_trainer, "WORTH_PICKING", worth)
        stage = Stage(spec)
        walk(stage, [1], S.GRAFTING)
        reports = []
        for number in range(3):
            run_step(stage)
            reports.append(stage.end_epoch(number).telemetry[0].signals)
        found.append((layer_of(stage).bank.tensors(), reports))
    (one, plain), (other, picked) = found
    assert one["step_count"][1] > 0
    assert same_dicts(one, other)
    for a, b in zip(plain, picked, strict=True):
        assert a.gradient_norm.tobytes() == b.gradient_norm.tobytes()


# ---- the step's order ------------------------------------------------------------------------


def test_a_step_out_of_order_is_refused() -> None:
    stage = Stage(stage_spec())
    with pytest.raises(RuntimeError, match="stage 'model' is at step 0, not 1"):
        stage.begin_step(1)


def test_losses_are_the_means_of_their_batches() -> None:
    stage = Stage(stage_spec())
    shares = [torch.stack(run_step(stage)).sum() for _ in range(2)]
    report = stage.end_epoch(5)
    assert report.losses == tuple(float(s) for s in shares)
    assert (report.epoch, report.step) == (5, 2)
    assert stage.end_epoch(6).losses == ()
    assert stage.in_flight == 0


def test_other_bytes_than_the_drivers_are_refused() -> None:
    with pytest.raises(ConfigError, match="stage 'model' reads other stdlib_text bytes"):
        Stage(stage_spec(data=data_spec(sha256="0" * 64)))


def test_metrics_and_transitions_reach_the_named_layer() -> None:
    stage = Stage(stage_spec())
    [name] = stage.trainers
    receipt = stage.apply(
        transitions([0, 1], [S.DORMANT, S.TRAINING], [S.GERMINATED, S.GRAFTING], layer_id=name)
    )
    assert receipt.applied.tolist() == [True, False]
    assert (receipt.layer_id, receipt.number, receipt.step) == (name, 1, 0)
    stage.record(replace(metrics([3], score=[0.5]), layer_id=name))
    assert layer_of(stage).state.state_tensor[3, 6] == 500


# ---- evaluation ------------------------------------------------------------------------------


def evaluate(stage: Stage, alphas: list[list[float]] | None, split: str = "gate") -> list[float]:
    table = {} if alphas is None else {"model.0.hidden.0": torch.tensor(alphas).numpy()}
    request = EvaluationRequest(1, split, len(alphas) if alphas else 1, table)
    for number in range(stage.evaluation_batches(request)):
        assert stage.evaluate(request, number, None) is None
    found = stage.evaluation()
    assert found is not None
    losses: list[float] = found.loss.tolist()
    return losses


def test_lesson_28_evaluation_changes_nothing() -> None:
    stage, twin = Stage(stage_spec()), Stage(stage_spec())
    for one in (stage, twin):
        walk(one, [0, 1], S.STABILIZATION)
        run_step(one)
    before = {n: v.clone() for n, v in stage.module.state_dict().items()}
    evaluate(stage, [[1, 1, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1]])
    assert same_dicts(before, dict(stage.module.state_dict()))
    assert stage.module.training
    assert all(map(same_bits, run_step(stage), run_step(twin)))
    assert same_dicts(host_gradients(stage), host_gradients(twin))


def test_alphas_of_one_request_equal_models_that_have_them() -> None:
    stage = Stage(stage_spec(data=data_spec(evaluation_samples=600)))
    assert stage.evaluation_batches(EvaluationRequest(1, "gate", 1, {})) == 2
    layer = layer_of(stage)
    walk(stage, everyone(stage), S.TRAINING)
    for _ in range(4):
        run_step(stage)
    asked = [[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.5, 1.0, 0.0, 1.0]]
    together = evaluate(stage, asked)
    assert len(set(together)) == 3
    for alphas, loss in zip(asked, together, strict=True):
        layer.state.alpha.copy_(torch.tensor(alphas))
        layer.refresh()
        assert evaluate(stage, None) == pytest.approx([loss], rel=1e-6)


def test_lesson_51_splits_are_evaluated_apart() -> None:
    stage = Stage(stage_spec())
    losses = [evaluate(stage, None, split) for split in ("train", "gate", "test")]
    assert len({loss[0] for loss in losses}) == 3
    assert evaluate(stage, None, "gate") == losses[1]


def test_an_objective_that_does_not_fit_its_blueprint_builds_no_stage() -> None:
    with pytest.raises(ConfigError, match="does not fit blueprint 'bottleneck'"):
        Stage(stage_spec(seeds=SeedSpec(objective="reconstruction")))
