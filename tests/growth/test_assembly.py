"""Import strings, patterns, and the stages that they lead to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from esper_ray.errors import ConfigError, NoMatch
from esper_ray.growth.assembly import (
    ModuleInfo,
    build_stage,
    inspect_stages,
    load_factories,
    match_targets,
)
from esper_ray.growth.spec import LayerSpec
from esper_ray.models import StageFactory, byte_mlp
from tests.builders import same_bits, stage_spec

BYTES = torch.zeros(2, 8, dtype=torch.int64)
SITES = ["reader.hidden.0", "predictor.hidden.0", "predictor.logits"]


def found() -> list[ModuleInfo]:
    return [m for stage in inspect_stages(byte_mlp(hidden=8), BYTES) for m in stage]


def test_modules_are_found_with_name_shape_and_weights() -> None:
    assert [(m.stage, m.layer_id, m.kind, m.shape, m.parameters) for m in found()] == [
        (0, "reader.embedding", "Embedding", (8, 12), 256 * 12),
        (0, "reader.hidden.0", "Linear", (8,), 96 * 8 + 8),
        (0, "reader.hidden.1", "ReLU", (8,), 0),
        (0, "reader.hidden", "Sequential", (8,), 96 * 8 + 8),
        (1, "predictor.hidden.0", "Linear", (8,), 8 * 8 + 8),
        (1, "predictor.hidden.1", "ReLU", (8,), 0),
        (1, "predictor.hidden", "Sequential", (8,), 8 * 8 + 8),
        (1, "predictor.logits", "Linear", (256,), 8 * 256 + 256),
    ]


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["reader.hidden"], ["reader.hidden"]),
        (["*.hidden"], ["reader.hidden", "predictor.hidden"]),
        (["predictor.logits", "*.hidden.0"], SITES),
        (["*.0", "*.hidden.0", "predictor.logits"], SITES),
    ],
)
def test_patterns_choose_modules_in_the_models_order(targets: list[str], names: list[str]) -> None:
    assert [m.layer_id for m in match_targets(found(), targets)] == names


def test_a_pattern_without_a_module_lists_the_nearest_names() -> None:
    with pytest.raises(NoMatch, match=r"entry 'reader.hiden' matches no module") as caught:
        match_targets(found(), ["*.hidden", "reader.hiden"])
    assert caught.value.hint.startswith("nearest: reader.hidden")


def test_nested_targets_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"match 'reader.hidden' and 'reader.hidden.0' inside it"):
        match_targets(found(), ["reader.hidden", "reader.hidden.0"])


def test_names_that_only_start_alike_are_not_nested() -> None:
    modules = [ModuleInfo(0, name, name, "Linear", (4,), 1) for name in ("s.fc", "s.fc2")]
    assert [m.layer_id for m in match_targets(modules, ["s.fc*"])] == ["s.fc", "s.fc2"]


@pytest.mark.parametrize(
    "factory",
    [
        "",
        ":",
        "esper_ray.models",
        "esper_ray.models:",
        ":byte_mlp",
        "no.such.module:f",
        "esper_ray.models:no_such_function",
        ".models:byte_mlp",
        "math:pi",
        "os:getcwd",
        "tests.models_for_tests:no_stages",
    ],
)
def test_a_factory_that_yields_no_stages_is_named(factory: str) -> None:
    with pytest.raises(ConfigError, match=f"model.factory '{factory}'"):
        load_factories(factory, {})


def test_arguments_that_a_factory_does_not_take_are_named() -> None:
    with pytest.raises(ConfigError, match=r"'esper_ray.models:byte_mlp'.*unexpected.*'depth'"):
        load_factories("esper_ray.models:byte_mlp", {"depth": 3})


def test_a_model_that_cannot_take_the_samples_is_named() -> None:
    with pytest.raises(ConfigError, match="stage 'reader' cannot take the data set's samples"):
        inspect_stages(byte_mlp(window=3), BYTES)


def test_a_model_that_cannot_be_built_is_named() -> None:
    with pytest.raises(ConfigError, match="stage 'reader' cannot be built"):
        inspect_stages(byte_mlp(hidden=-1), BYTES)


def test_the_host_is_the_same_with_and_without_seeds() -> None:
    spec = stage_spec()
    module, [layer] = build_stage(spec)
    bare, none = build_stage(replace(spec, layers=()))
    assert none == []
    assert module.get_submodule("0.hidden.0.esper_seeds") is layer
    assert (layer.layer_id, layer.chunks.width, layer.chunks.num_seeds) == (
        "model.0.hidden.0",
        8,
        4,
    )
    seeds = {id(p) for p in layer.bank.parameters()}
    hosts = [p for p in module.parameters() if id(p) not in seeds]
    assert all(same_bits(a, b) for a, b in zip(hosts, bare.parameters(), strict=True))


def test_stages_differ_by_run_seed_only_in_their_numbers() -> None:
    one, _ = build_stage(stage_spec(run_seed=1))
    other, _ = build_stage(stage_spec(run_seed=2))
    again, _ = build_stage(stage_spec(run_seed=1))
    weights = [dict(m.named_parameters())["0.embedding.weight"] for m in (one, other, again)]
    assert not torch.equal(weights[0], weights[1])
    assert same_bits(weights[0], weights[2])


def test_a_target_may_be_a_direct_child() -> None:
    spec = stage_spec(
        factory="tests.models_for_tests:twice",
        factory_args={},
        layers=(LayerSpec("model.shared", "shared", 4, 2),),
    )
    module, [layer] = build_stage(spec)
    assert module.get_submodule("shared.esper_seeds") is layer
    assert isinstance(module.get_submodule("shared"), nn.Linear)


def test_a_stage_is_inspected_without_touching_real_weights() -> None:
    built: list[nn.Module] = []

    def build() -> nn.Module:
        built.append(nn.Linear(4, 3))
        return built[-1]

    [[*modules]] = inspect_stages(
        [StageFactory("s", lambda: nn.Sequential(build()))], torch.ones(2, 4)
    )
    assert [m.layer_id for m in modules] == ["s.0"]
    assert next(built[0].parameters()).device.type == "meta"
