"""The demo models with attention and convolutions grow like any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from esper_ray.config import RunConfig
from tests.runs.history import assert_log_replays, grow

ConfigMaker = Callable[..., RunConfig]

GPT = {
    "data__args": {"window": 6, "cap_bytes": 60_000},
    "data__evaluation_samples": 64,
    "model__factory": "esper_ray.models:byte_gpt",
    "seeds__targets": ["*.blocks.*.mlp"],
    "seeds__blueprint": "input_mlp",
}
CONVNET = {
    "data__name": "digits",
    "data__evaluation_samples": 64,
    "model__factory": "esper_ray.models:small_convnet",
    "model__args": {"channels": [4, 8]},
    "seeds__targets": ["predictor.pool"],
}


def gpt(stages: int) -> dict[str, Any]:
    args = {"layers": 2, "width": 16, "heads": 2, "context": 8, "stages": stages}
    return {**GPT, "model__args": args}


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (gpt(2), ["reader.blocks.0.mlp", "predictor.blocks.0.mlp"]),
        (gpt(1), ["model.blocks.0.mlp", "model.blocks.1.mlp"]),
        (CONVNET, ["predictor.pool"]),
    ],
    ids=["gpt-2", "gpt-1", "convnet"],
)
def test_seeds_of_a_demo_model_live_a_whole_life(
    make_config: ConfigMaker, model: dict[str, Any], layers: list[str]
) -> None:
    log, plan, reports = grow(make_config(train__epochs=28, **model))
    grown = {layer for report in reports for layer, _, _, to in report.moves if to == "FOSSILIZED"}
    assert grown == set(layers)
    assert list(plan.stage_of) == layers
    assert reports[-1].losses[-1] < reports[0].losses[0]
    assert_log_replays(log, plan)
