"""The run file: every key, what it accepts, what it refuses and in which words."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from esper_ray.config import RunConfig, load_config, parse_config, parse_yaml
from esper_ray.errors import ConfigError
from esper_ray.lifecycle import MINIMUM_EPOCHS, ExtendedLifecycle, GateSettings

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))

EVERY_KEY: dict[str, Any] = {
    "run": "a-run-2",
    "seed": 5,
    "data.name": "digits",
    "data.args": {"window": 4, "deep": {"list": [1, 2.5, None, "x", True]}},
    "data.batch_size": 64,
    "data.evaluation_samples": 100,
    "model.factory": "my.models:build",
    "model.args": {"hidden": 8},
    "train.epochs": 3,
    "train.divergence": 7.5,
    "train.lr": 0.5,
    "train.micro_batches": 4,
    "seeds.targets": ["a.*", "b"],
    "seeds.seeds_per_layer": 2,
    "seeds.epoch_steps": 9,
    "seeds.blueprint": "autoencoder",
    "seeds.hidden": 7,
    "seeds.objective": "reconstruction",
    "seeds.gradient_step": 0.25,
    "seeds.lr": 0.0,
    "seeds.warmup_steps": 0,
    "seeds.chunk_sizes": [3, 5],
    "seeds.grafting.strategy": "linear",
    "seeds.grafting.ramp_epochs": 5,
    "seeds.grafting.drift_threshold": 0.125,
    "seeds.grafting.drift_unit": "epoch",
    "seeds.grafting.pause_epochs": 0,
    "seeds.grafting.resume": "continue",
    "seeds.grafting.momentum_factor": 0.5,
    "seeds.grafting.adaptive_drift": 0.25,
    "seeds.grafting.adaptive_delta": 0.125,
    "seeds.grafting.check_every": 3,
    "seeds.grafting.loss_variance_max": 0.5,
    "seeds.grafting.gradient_norm_max": 2.0,
    "seeds.grafting.accuracy_variance_max": 0.25,
    "seeds.grafting.selection.mode": "ab",
    "seeds.grafting.selection.arms": ["linear", "momentum"],
    "seeds.grafting.selection.experiment": "x",
    "seeds.grafting.selection.improving_delta": 0.5,
    "seeds.grafting.selection.improving_epochs": 2,
    "seeds.grafting.selection.cooldown_epochs": 4,
    "train.precision": "float64",
    "lifecycle.sync": True,
    "lifecycle.germinate_after": 0,
    "lifecycle.max_growing": 6,
    "lifecycle.minimum_epochs": {"TRAINING": 2},
    "lifecycle.training_timeout": 11,
    "lifecycle.fine_tuning_timeout": 12,
    "lifecycle.error_limit": 3,
    "lifecycle.gates": {"stability_min": 0.5, "inconclusive_epochs": 4},
    "lifecycle.replanting": True,
    "lifecycle.embargo_epochs": 5,
    "lifecycle.budgets.training_per_layer": 2,
    "lifecycle.budgets.training_in_all": 3,
    "lifecycle.budgets.grafting_per_layer": 4,
    "lifecycle.budgets.grafting_in_all": 5,
    "storage.url": "s3://bucket/run",
    "storage.options": {"anon": True},
    "storage.replicas": ["s3://other/run"],
    "storage.replica_options": {"anon": False},
    "storage.every_epochs": 2,
    "storage.timeout_s": 5.0,
    "storage.on_upload_error": "warn",
    "storage.single_writer": "unsafe",
    "storage.signing_key_env": "RUN_KEY",
    "storage.signing_key_file": "",
    "cluster.address": "auto",
    "cluster.transport": "object_store",
    "cluster.shards": 2,
    "cluster.gpus": 0,
    "cluster.recompute": True,
    "cluster.threads": 2,
    "cluster.wait_for_resources_s": 1.5,
    "cluster.step_timeout_s": 30.0,
    "cluster.answer_timeout_s": 5.0,
    "cluster.max_failures": 3,
    "cluster.outage_timeout_s": 60.0,
    "events.bus": "ray://hub",
}


def nested(keys: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in keys.items():
        *sections, key = name.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = copy.deepcopy(value)
    return values


def keys_of(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys_of(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def look_up(config: RunConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


# ------------------------------------------------------------------ every key


def test_the_table_above_holds_every_key() -> None:
    assert sorted(EVERY_KEY) == sorted(keys_of(RunConfig))


def test_every_key_is_taken_as_it_is_written() -> None:
    config = parse_config(nested(EVERY_KEY))
    assert {name: look_up(config, name) for name in EVERY_KEY} == EVERY_KEY


def test_config_goes_through_its_dump_unchanged() -> None:
    config = parse_config(nested(EVERY_KEY))
    assert parse_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("name", [key for key in EVERY_KEY if key != "run"])
def test_every_key_but_the_name_has_a_default_that_is_allowed(name: str) -> None:
    default = look_up(parse_config({"run": "a"}), name)
    assert look_up(parse_config(nested({"run": "a", name: default})), name) == default


def test_name_of_the_run_is_needed() -> None:
    with pytest.raises(ConfigError, match="the key 'run' is missing"):
        parse_config({})


@pytest.mark.parametrize("name", ["", "A", "a b", "a/b", "../a", "a" * 65, "ä"])
def test_name_of_the_run_fits_into_urls_and_metrics(name: str) -> None:
    with pytest.raises(ConfigError, match="run: must be 1 to 64"):
        parse_config({"run": name})


def test_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_config({"run": "a"}).seed = 1  # type: ignore[misc]


def test_storage_is_opened_as_the_run_says() -> None:
    said = {"options": {"anon": True}, "timeout_s": 5.0, "single_writer": "unsafe"}
    access = parse_config({"run": "a", "storage": said}).storage.access
    assert access == {"storage_options": {"anon": True}, "timeout_s": 5.0, "unsafe": True}
    assert parse_config({"run": "a"}).storage.access["unsafe"] is False
    assert parse_config({"run": "a", "storage": said}).storage.replica_access == access
    own = parse_config({"run": "a", "storage": {**said, "replica_options": {}}})
    assert own.storage.replica_access == {**access, "storage_options": {}}


def test_storage_defaults_to_a_folder_of_the_run() -> None:
    assert parse_config({"run": "a"}).storage_url == "runs/a/checkpoints"


def test_minima_are_the_defaults_overlaid() -> None:
    config = parse_config({"run": "a", "lifecycle": {"minimum_epochs": {"GRAFTING": 3}}})
    assert config.lifecycle.minima() == {**MINIMUM_EPOCHS, ExtendedLifecycle.GRAFTING: 3}


# ------------------------------------------------------------------ identity


def test_identity_leaves_out_length_and_place_only() -> None:
    apart = ("storage.", "cluster.", "events.")
    left_out = {k for k in EVERY_KEY if k.startswith(apart)} | {"train.epochs"}
    identity = parse_config(nested(EVERY_KEY)).identity()
    known = {key for key in EVERY_KEY if any(f"{i}.".startswith(f"{key}.") for i in identity)}
    assert known == set(EVERY_KEY) - left_out


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.epochs", 4),
        ("storage.url", "elsewhere"),
        ("storage.every_epochs", 9),
        ("cluster.address", "local"),
        ("cluster.threads", 1),
        ("events.bus", "memory://other"),
    ],
)
def test_length_and_place_do_not_change_the_identity(name: str, value: object) -> None:
    changed = parse_config(nested({**EVERY_KEY, name: value}))
    assert changed.identity() == parse_config(nested(EVERY_KEY)).identity()


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 6), ("train.lr", 0.25), ("seeds.grafting.pause_epochs", 1), ("model.args", {})],
)
def test_everything_else_changes_the_identity(name: str, value: object) -> None:
    changed = parse_config(nested({**EVERY_KEY, name: value}))
    assert changed.identity() != parse_config(nested(EVERY_KEY)).identity()


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("section", ["", "data", "seeds.grafting", "lifecycle", "cluster"])
def test_unknown_key_is_named_with_the_nearest(section: str) -> None:
    name = f"{section}.unheard_of".lstrip(".")
    with pytest.raises(ConfigError, match=f"unknown key '{name}'; the nearest is '[a-z_]+'"):
        parse_config({"run": "a", **nested({name: 1})})


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("lifecycle.gates", list(GateSettings.__dataclass_fields__)),
        ("lifecycle.minimum_epochs", [state.name for state in MINIMUM_EPOCHS]),
    ],
)
def test_unknown_gate_or_state_is_named_with_the_nearest(key: str, names: list[str]) -> None:
    for name in names:
        with pytest.raises(ConfigError, match=f"the nearest is '{name}'"):
            parse_config(nested({"run": "a", key: {f"{name}X": 1}}))
        parse_config(nested({"run": "a", key: {name: 1}}))


@pytest.mark.parametrize(
    "name", [k for k, v in EVERY_KEY.items() if isinstance(v, int | float) and v is not True]
)
@pytest.mark.parametrize(
    "value", [True, "1", [1], None, float("nan"), float("inf"), 10**30, -1, 10**12]
)
def test_numbers_are_refused_that_are_none_or_too_large(name: str, value: object) -> None:
    if name == "seed" and value == 10**12:
        return  # any 63-bit number will do as a seed
    if "budgets" in name and value is None:
        return  # no limit
    with pytest.raises(ConfigError, match=name):
        parse_config(nested({"run": "a", name: value}))


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 10**400, b"x", {1, 2}, "\0"])
@pytest.mark.parametrize(
    "name", ["data.args", "model.args", "storage.options", "storage.replica_options"]
)
def test_free_arguments_hold_only_what_a_manifest_can(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{name}\.deep\.er\.0: a \w+ that is neither"):
        parse_config(nested({"run": "a", name: {"deep": {"er": [value]}}}))


def test_integers_are_taken_as_floats_and_not_the_other_way() -> None:
    assert parse_config({"run": "a", "train": {"lr": 1}}).train.lr == 1.0
    with pytest.raises(ConfigError, match=r"train\.epochs"):
        parse_config({"run": "a", "train": {"epochs": 1.0}})


def test_long_values_and_names_are_cut() -> None:
    long = "x" * 10_000
    for values in ({"run": long}, {"run": "a", long: 1}, {"run": "a", "train": {"epochs": long}}):
        with pytest.raises(ConfigError) as caught:
            parse_config(values)
        assert len(caught.value.message) < 300
        assert len(caught.value.hint) < 300


# ------------------------------------------------------------------ YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-3", 2e-3),
        ("2E3", 2000.0),
        ("-1e+2", -100.0),
        ("1.5e-3", 1.5e-3),
        ("1.e2", 100.0),
        ("10", 10),
        ("1e", "1e"),
        ("e3", "e3"),
        ("2e-3x", "2e-3x"),
        ("[1e1, a]", [10.0, "a"]),
        ("", None),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, value: object) -> None:
    assert parse_yaml(text) == value


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_is_read_back_exactly(value: float) -> None:
    assert parse_yaml(repr(value)) == value


@given(st.text(max_size=60))
def test_any_text_is_a_value_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        parse_yaml(text)


# ------------------------------------------------------------------ files and overrides


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.name for path in EXAMPLES])
def test_example_loads(path: Path) -> None:
    assert load_config(path).run == path.stem.replace("_", "-")


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("run: a\ntrain: {epochs: 7}\n")
    return path


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("train.epochs=9", "train.epochs", 9),
        ("train.lr=2e-3", "train.lr", 2e-3),
        ("seeds.targets=[a, 'b.*']", "seeds.targets", ["a", "b.*"]),
        ("seeds.grafting.strategy=linear", "seeds.grafting.strategy", "linear"),
        ("lifecycle.gates.stability_min=0.5", "lifecycle.gates", {"stability_min": 0.5}),
        ("storage.url=s3://b/r?x=1", "storage.url", "s3://b/r?x=1"),
        ("data.args={}", "data.args", {}),
        ("run=other", "run", "other"),
    ],
)
def test_override_sets_a_key_and_makes_its_sections(
    run_file: Path, override: str, name: str, value: object
) -> None:
    assert look_up(load_config(run_file, [override]), name) == value


def test_last_override_wins_and_the_rest_of_the_section_stays(run_file: Path) -> None:
    config = load_config(run_file, ["train.lr=1", "train.lr=2"])
    assert (config.train.lr, config.train.epochs) == (2.0, 7)


@pytest.mark.parametrize("override", ["train.epochs", "=1", "", "run.x=1", "train=", "train.x.y=1"])
def test_override_of_another_form_is_refused(run_file: Path, override: str) -> None:
    with pytest.raises(ConfigError):
        load_config(run_file, [override])


def test_run_file_of_a_mebibyte_is_the_largest(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run: a\n#" + "x" * (2**20 - 8))
    assert load_config(path).run == "a"
    path.write_text("run: a\n#" + "x" * (2**20 - 7))
    with pytest.raises(ConfigError, match="larger than"):
        load_config(path)
