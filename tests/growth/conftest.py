"""Stages of the small byte model, with and without seeds."""

from __future__ import annotations

import pytest

from esper_ray.growth.spec import LayerSpec, SeedSpec, StageSpec
from tests.builders import stage_spec

PAIRINGS = [
    ("gradient_target", "bottleneck"),
    ("gradient_target", "input_mlp"),
    ("gradient_target", "input_chunk_mlp"),
    ("reconstruction", "autoencoder"),
]
INPUTS = 4 * 3  # a window of four bytes, embedded
FIRST = "0.hidden.0"


@pytest.fixture(params=PAIRINGS, ids="-".join)
def seeds(request: pytest.FixtureRequest) -> SeedSpec:
    """Every objective with the blueprint that it fits."""
    name, blueprint = request.param
    return SeedSpec(blueprint=blueprint, objective=name, hidden=4)


@pytest.fixture(params=[4, 3], ids=["even", "ragged"])
def spec(request: pytest.FixtureRequest, seeds: SeedSpec) -> StageSpec:
    """The whole model in one stage; eight features among four or three seeds."""
    layer = LayerSpec(f"model.{FIRST}", FIRST, 8, request.param, inputs=INPUTS)
    return stage_spec(seeds=seeds, layers=(layer,))
