"""The steps of a GPT that `bench layer` compares are of models of equal size, and both train."""

from __future__ import annotations

import dataclasses

import pytest

from esper_ray.bench.gpt import CASES, GPTCase
from esper_ray.lifecycle import ExtendedLifecycle as S


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.blueprint or "dormant")
def test_both_sides_have_as_many_parameters_and_train(case: GPTCase) -> None:
    case = dataclasses.replace(case, samples=1)
    bare, seeded = case.bare("cpu"), case.seeded("cpu")
    sizes = [sum(p.numel() for p in step.model.parameters()) for step in (bare, seeded)]
    if case.blueprint:
        assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    for step in (bare, seeded):
        weight = step.model.get_parameter("blocks.0.mlp.up.weight")
        old = weight.detach().clone()
        step()
        assert not weight.equal(old)
    for trainer in seeded.trainers:
        bank, state = trainer.layer.bank, trainer.layer.state
        states = {S(code) for code in state.view().state.tolist()}
        assert states == ({S.GRAFTING} if case.blueprint else {S.DORMANT})
        assert (bank.step_count[bank.slots(trainer.layer.rows_in(S.GRAFTING))] == 1).all()
