"""Demo models: stages that fit together, each buildable alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from esper_ray import data
from esper_ray.models import StageFactory, byte_mlp, digits_mlp


def run(stages: list[StageFactory], x: Tensor) -> Tensor:
    for stage in stages:
        x = stage.build()(x)
    return x


@pytest.mark.parametrize("hidden", [1, 8, 64])
def test_the_byte_model_predicts_one_of_256_bytes(hidden: int) -> None:
    x, _ = data.load("stdlib_text", cap_bytes=60_000).train.take(torch.arange(3))
    assert run(byte_mlp(hidden=hidden), x).shape == (3, 256)


def test_the_default_byte_model_has_the_documented_size() -> None:
    weights = sum(p.numel() for stage in byte_mlp() for p in stage.build().parameters())
    assert weights == 30_080


@pytest.mark.parametrize("hidden", [1, 32])
def test_the_digits_model_predicts_one_of_ten_classes(hidden: int) -> None:
    x, _ = data.load("digits").train.take(torch.arange(3))
    assert run(digits_mlp(hidden=hidden), x).shape == (3, 10)


@pytest.mark.parametrize("stages", [byte_mlp(), digits_mlp()], ids=["byte_mlp", "digits_mlp"])
def test_stages_are_named_and_at_least_two(stages: list[StageFactory]) -> None:
    assert [stage.name for stage in stages] == ["reader", "predictor"]


def test_each_build_makes_weights_of_its_own() -> None:
    stage = byte_mlp()[1]
    one, other = stage.build(), stage.build()
    assert not {id(p) for p in one.parameters()} & {id(p) for p in other.parameters()}
