"""From a run file to specs: what is matched, counted and refused, with nothing started."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from esper_ray.blueprints import blueprint
from esper_ray.config import parse_config
from esper_ray.errors import ConfigError, NoMatch
from esper_ray.growth.stage import Stage
from esper_ray.planning import RunPlan, plan_run

TEXT = {"window": 4, "cap_bytes": 60_000}


def plan(**sections: dict[str, Any]) -> RunPlan:
    values: dict[str, dict[str, Any]] = {
        "data": {"args": TEXT, "batch_size": 8, "evaluation_samples": 32},
        "model": {"args": {"window": 4, "embedding": 4, "hidden": 10}},
        "seeds": {"targets": ["*.hidden"], "hidden": 3},
    }
    for name, keys in sections.items():
        values[name] = {**values.get(name, {}), **keys}
    return plan_run(parse_config({"run": "plan", **values}))


def test_stages_and_layers_follow_the_model() -> None:
    found = plan()
    assert [(s.index, s.count, s.name, s.first, s.last) for s in found.stages] == [
        (0, 2, "reader", True, False),
        (1, 2, "predictor", False, True),
    ]
    assert found.stage_of == {"reader.hidden": 0, "predictor.hidden": 1}
    assert [layer.path for stage in found.stages for layer in stage.layers] == ["hidden", "hidden"]
    assert found.card.name == "stdlib_text"


@pytest.mark.parametrize(("hidden", "seeds", "chunk"), [(10, 3, 4), (160, 80, 2)])
def test_planned_numbers_are_those_of_the_built_stage_when_every_seed_has_grown(
    hidden: int, seeds: int, chunk: int
) -> None:
    model = {"args": {"window": 4, "embedding": 4, "hidden": hidden}}
    found = plan(model=model, seeds={"seeds_per_layer": seeds, "targets": ["*.hidden"]})
    for spec, layer in zip(found.stages, found.layers, strict=True):
        trainer = Stage(spec).trainers[layer.layer_id]
        bank = trainer.layer.bank
        bank.claim(torch.arange(seeds))
        assert (layer.width, layer.seeds, layer.chunk) == (hidden, seeds, chunk)
        assert layer.seed_parameters == bank.weights_per_seed * seeds
        assert layer.bytes == sum(t.nbytes for t in (*bank.parameters(), *bank.buffers()))
        assert layer.host_parameters == trainer.layer.host_weights


def test_planning_a_large_model_allocates_nothing() -> None:
    found = plan(model={"args": {"window": 4, "embedding": 4, "hidden": 200_000}})
    assert found.layers[1].host_parameters == 200_000**2 + 200_000  # 160 GB if it were built


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (["reader.hidden"], ["reader.hidden"]),
        (["predictor.*"], None),
        (
            ["predictor.logits", "*.hidden"],
            ["reader.hidden", "predictor.hidden", "predictor.logits"],
        ),
        (["*.hidden", "reader.*n"], ["reader.hidden", "predictor.hidden"]),
    ],
)
def test_targets_choose_layers_in_the_order_of_the_model(
    targets: list[str], layers: list[str] | None
) -> None:
    if layers is None:
        with pytest.raises(ConfigError, match="inside it"):
            plan(seeds={"targets": targets})
    else:
        assert [layer.layer_id for layer in plan(seeds={"targets": targets}).layers] == layers


def test_every_target_must_match_and_the_nearest_names_are_listed() -> None:
    with pytest.raises(NoMatch, match=r"'redaer\.hidden' matches no module") as caught:
        plan(seeds={"targets": ["*.hidden", "redaer.hidden"]})
    assert caught.value.hint.startswith("nearest: reader.hidden, ")


@pytest.mark.parametrize("seeds", [11, 1_000_000])
def test_more_seeds_than_features_are_refused(seeds: int) -> None:
    with pytest.raises(ConfigError, match=f"10 features, too few for {seeds} seeds") as caught:
        plan(seeds={"seeds_per_layer": seeds})
    assert caught.value.hint == "set seeds.seeds_per_layer to at most 10"


def test_as_many_seeds_as_features_are_the_most() -> None:
    assert [layer.chunk for layer in plan(seeds={"seeds_per_layer": 10}).layers] == [1, 1]


@pytest.mark.parametrize("window", [4.5, 4.0, "4", None])
def test_window_of_another_type_is_a_config_error(window: object) -> None:
    with pytest.raises(ConfigError, match=r"stdlib_text.* window"):
        plan(data={"args": {**TEXT, "window": window}})


def test_model_that_does_not_fit_the_data_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="'reader' cannot take the data set's samples"):
        plan(model={"args": {"window": 5}})


def test_settings_reach_the_specs() -> None:
    found = plan(
        train={"epochs": 7, "lr": 0.5, "micro_batches": 4},
        seeds={
            "epoch_steps": 3,
            "blueprint": "autoencoder",
            "objective": "reconstruction",
            "gradient_step": 0.25,
            "lr": 0.125,
            "warmup_steps": 2,
            "grafting": {"strategy": "linear", "ramp_epochs": 5, "pause_epochs": 1},
        },
        lifecycle={
            "germinate_after": 1,
            "max_growing": 2,
            "minimum_epochs": {"TRAINING": 9},
            "training_timeout": 11,
            "fine_tuning_timeout": 12,
            "gates": {"stability_min": 0.5},
        },
        storage={"every_epochs": 6},
        cluster={"threads": 2, "step_timeout_s": 9.0},
    )
    stage, coordinator = found.stages[1], found.coordinator
    assert (stage.host_lr, stage.epoch_steps, stage.threads, stage.data.micro_batches) == (
        0.5,
        3,
        2,
        4,
    )
    assert (stage.seeds.k, stage.seeds.optimizer.lr, stage.seeds.optimizer.warmup_steps) == (
        0.25,
        0.125,
        2,
    )
    assert (stage.seeds.grafting.ramp_epochs, stage.seeds.grafting.pause_epochs) == (5, 1)
    assert (coordinator.actors, coordinator.epochs, coordinator.every_epochs) == (2, 7, 6)
    assert coordinator.timeout_s == 9.0
    policy = coordinator.policy
    assert policy.blueprint_id == blueprint("autoencoder").blueprint_id
    assert (policy.objective, policy.strategy_id, policy.ramp_epochs) == ("reconstruction", 0, 5)
    assert (policy.germinate_after, policy.max_growing) == (1, 2)
    assert (policy.training_timeout, policy.fine_tuning_timeout) == (11, 12)
    assert coordinator.manager.gates.changed() == {"stability_min": 0.5}
    assert {s.name: n for s, n in coordinator.manager.minimum_epochs.items()}["TRAINING"] == 9


def test_equal_run_files_have_equal_digests_and_others_have_not() -> None:
    one, same = plan().coordinator.manifest, plan(storage={"url": "there"}).coordinator.manifest
    other = plan(train={"lr": 0.5}).coordinator.manifest
    assert one["config_digest"] == same["config_digest"]
    assert one["config_digest"] != other["config_digest"]
    assert one["rng"] == {"kind": "counter", "seed": 0}


def test_commits_will_name_the_width_of_every_layer() -> None:
    planned = plan()
    widths = {layer.layer_id: layer.width for layer in planned.layers}
    assert widths
    assert planned.coordinator.manifest["widths"] == widths


def test_planning_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    plan()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["input_mlp", "input_chunk_mlp"])
def test_a_blueprint_that_reads_the_input_is_planned_with_its_width(name: str) -> None:
    found = plan(seeds={"blueprint": name})
    assert [layer.inputs for stage in found.stages for layer in stage.layers] == [16, 10]
    narrow = plan(seeds={"blueprint": "bottleneck"})
    assert found.layers[0].seed_parameters > narrow.layers[0].seed_parameters


@pytest.mark.parametrize("name", ["input_mlp", "input_chunk_mlp"])
def test_a_blueprint_cannot_read_the_input_of_a_layer_that_takes_bytes(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' reads the host layer's input") as caught:
        plan(seeds={"blueprint": name, "targets": ["reader.embedding"], "seeds_per_layer": 2})
    assert "a blueprint that reads its chunk" in caught.value.hint
    plan(seeds={"targets": ["reader.embedding"], "seeds_per_layer": 2})


@pytest.mark.parametrize(
    ("seeds", "name"),
    [
        ({}, "input_mlp"),
        ({"targets": ["reader.embedding", "*.hidden"]}, "bottleneck"),
        ({"objective": "reconstruction"}, "autoencoder"),
        ({"blueprint": "affine"}, "affine"),
    ],
)
def test_a_run_grows_what_suits_its_modules_and_stores_the_name(
    seeds: dict[str, Any], name: str
) -> None:
    found = plan(seeds={"seeds_per_layer": 2, **seeds})
    assert {stage.seeds.blueprint for stage in found.stages} == {name}
    assert found.coordinator.policy.blueprint_id == blueprint(name).blueprint_id
    stored: Any = found.coordinator.manifest["config"]
    assert stored["seeds.blueprint"] == name
