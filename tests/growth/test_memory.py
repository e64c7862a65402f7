"""A stage that is taken back goes on as if nothing had happened since."""

from __future__ import annotations

import pytest
import torch

from esper_ray.growth import snapshot
from esper_ray.growth.checking import check, end_epoch, trying
from esper_ray.growth.governor import Trial
from esper_ray.growth.memory import StageMemory
from esper_ray.growth.stage import Stage
from esper_ray.lifecycle import ExtendedLifecycle as S
from tests.builders import data_spec, move, randomise, run_step, same_bits, stage_spec, walk

LAYER = "model.0.hidden.0"


def grown_stage() -> Stage:
    stage = Stage(stage_spec(epoch_steps=4))
    layer = stage.trainers[LAYER].layer
    walk(stage, [0, 1], S.TRAINING)
    randomise(layer)
    walk(stage, [2], S.GRAFTING)
    walk(stage, [3], S.STABILIZATION)
    layer.state.alpha[2] = 0.5
    layer.state.changed()
    stage.trainers[LAYER].reset_epoch()
    return stage


def everything(stage: Stage) -> dict[str, torch.Tensor]:
    trainer = stage.trainers[LAYER]
    parts = {
        "host": snapshot.host_tensors(stage),
        "grown": snapshot.grown_tensors(trainer.layer),
        "parked": snapshot.rollback_tensors(trainer.layer),
        "epoch": trainer.epoch_tensors(),
        "state": {
            n: torch.from_numpy(v) for n, v in snapshot.state_columns(trainer.layer.state).items()
        },
    }
    return {f"{part}/{n}": v.clone() for part, found in parts.items() for n, v in found.items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not same_bits(one[name], other[name])] == []


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_stage_goes_back_bit_for_bit_and_then_does_the_same_again(steps: int) -> None:
    stage = grown_stage()
    memory = StageMemory(stage)
    for _ in range(steps):
        run_step(stage)
    memory.keep()
    before, losses = everything(stage), [loss.clone() for loss in stage.losses]
    for _ in range(2):
        run_step(stage)
    after = everything(stage)
    assert not same_bits(
        before["host/parameter/0.hidden.0.weight"], after["host/parameter/0.hidden.0.weight"]
    )
    for _ in range(2):
        memory.back(steps)
        assert stage.step == steps
        assert stage.losses == losses
        assert_same(everything(stage), before)
        for _ in range(2):
            run_step(stage)
        assert_same(everything(stage), after)


def test_an_epoch_that_was_reported_is_taken_back_too() -> None:
    stage = grown_stage()
    memory = StageMemory(stage)
    memory.before_step()
    before = everything(stage)
    reports = []
    for _ in range(2):
        for _ in range(4):
            run_step(stage)
        reports.append(end_epoch(stage, 0))
        memory.back(0)
        assert_same(everything(stage), before)
    one, two = reports
    assert one.losses == two.losses
    assert one.telemetry[0].error_count.tolist() == two.telemetry[0].error_count.tolist()
    assert one.telemetry[0].signals.weight_drift.tolist() == (
        two.telemetry[0].signals.weight_drift.tolist()
    )


def test_only_the_last_two_steps_are_kept() -> None:
    stage = grown_stage()
    memory = StageMemory(stage)
    for _ in range(3):
        memory.keep()
        run_step(stage)
    memory.back(1)
    with pytest.raises(KeyError):
        memory.back(0)


def test_a_step_without_some_seeds_is_that_of_a_stage_whose_seeds_are_retired() -> None:
    stage, retired = grown_stage(), grown_stage()
    walk_back = [(2, S.GRAFTING), (3, S.STABILIZATION)]
    for seed, state in walk_back:
        move(retired, [seed], state, S.ROLLED_BACK)
    with trying(stage, Trial(0, {LAYER: (2, 3)})):
        run_step(stage)
    run_step(retired)
    one, two = snapshot.host_tensors(stage), snapshot.host_tensors(retired)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-7)
    assert stage.trainers[LAYER].layer.state.view().alpha[3] == 1  # nothing was changed


def test_a_step_on_another_batch_draws_other_samples() -> None:
    stage = grown_stage()
    memory = StageMemory(stage)
    memory.keep()
    first = [loss.item() for loss in run_step(stage)]
    memory.back(0)
    with trying(stage, Trial(0, other_batch=True)):
        other = [loss.item() for loss in run_step(stage)]
    memory.back(0)
    assert [loss.item() for loss in run_step(stage)] == first != other


def test_the_first_output_that_is_not_a_number_is_named() -> None:
    stage = Stage(stage_spec(data=data_spec(micro_batches=1)))
    with torch.no_grad():
        stage.host_parameters["0.hidden.0.weight"][0, 0] = torch.nan
    with trying(stage, Trial(0)) as watch:
        run_step(stage)
    found = check(stage, watch)
    assert found.output == ("model.0.hidden.0", "output")
    assert found.loss != found.loss
    assert end_epoch(stage, 0).broken


def test_a_gradient_that_is_not_a_number_is_named_from_behind() -> None:
    stage = Stage(stage_spec(data=data_spec(micro_batches=1)))
    weight = stage.host_parameters["0.hidden.0.weight"]
    weight.register_hook(lambda grad: grad * torch.inf)  # type: ignore[no-untyped-call]
    with trying(stage, Trial(0)) as watch:
        run_step(stage)
    found = check(stage, watch)
    assert found.output is None
    assert found.broken == ("model.0.hidden.0", "gradient of weight")


def test_a_good_step_has_nothing_to_name() -> None:
    stage = grown_stage()
    with trying(stage, Trial(0)) as watch:
        run_step(stage)
    found = check(stage, watch)
    assert found.output is None
    assert found.broken is None
    assert found.steepest[0] > 0
    assert end_epoch(stage, 0).broken == ""
