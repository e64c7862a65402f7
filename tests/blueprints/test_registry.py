"""Blueprints are found by name."""

from __future__ import annotations

import pytest
from torch import nn

from esper_ray.blueprints import blueprint, blueprint_names, register_module_blueprint
from esper_ray.errors import ConfigError


def test_stored_numbers_never_change() -> None:
    numbers = {name: blueprint(name).blueprint_id for name in blueprint_names()}
    assert numbers == {
        "bottleneck": 0,
        "autoencoder": 1,
        "low_rank": 2,
        "affine": 3,
        "input_mlp": 4,
        "input_chunk_mlp": 5,
    }


@pytest.mark.parametrize("number", [-1, 2**31])
def test_a_number_that_no_column_holds_is_refused(number: int) -> None:
    before = blueprint_names()
    with pytest.raises(ValueError, match="'lost' needs an id in"):
        register_module_blueprint("lost", number)(lambda shape: nn.Linear(shape.chunk, 1))
    assert blueprint_names() == before


def test_lesson_12_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'attention'") as caught:
        blueprint("attention")
    assert caught.value.hint == f"choose one of: {', '.join(blueprint_names())}"
