"""Phase 1 tables and `.pt` records become one commit, from which layers restore."""

from __future__ import annotations

import atexit
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from esper_ray.errors import ConfigError, CorruptError, MigrationError, UnsafeInputError
from esper_ray.layers import LayerSeeds
from esper_ray.legacy.importing import Imported, import_folder
from esper_ray.legacy.loading import PtLoader
from esper_ray.legacy.restoring import ImportedLayer, restore_layer
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.storage import Root, RunCheckpoints, RunLog
from tests.legacy.old_store import SECONDS, record, record_in_ms, record_v1, save, state, table


@functools.cache
def shared_loader() -> PtLoader:
    """One child for all tests: it starts slowly and ends with this process."""
    loader = PtLoader().__enter__()
    atexit.register(loader.__exit__, None, None, None)
    return loader


def imported(folder: Path, **options: Any) -> tuple[Imported, RunLog]:
    root = Root.open(str(folder.parent / "new"))
    return import_folder(folder, root, loader=shared_loader(), **options), RunLog(root)


def layer_of(folder: Path, name: str = "encoder.3_b", **options: Any) -> ImportedLayer:
    done, log = imported(folder, **options)
    assert RunCheckpoints(log).verify() == []
    return restore_layer(log, done.seq, name)


def row(layer: ImportedLayer, seed: int) -> dict[str, Any]:
    return {name: values[seed].tolist() for name, values in layer.columns.items()}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    folder = tmp_path / "old"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("make", [record, record_in_ms])
def test_a_version_2_record_restores_every_value(old: Path, make: Any) -> None:
    save(old, make())
    layer = layer_of(old)
    assert len(layer.columns["seed_id"]) == 3
    told = row(layer, 2)
    assert told["lifecycle_state"] == S.GRAFTING
    assert {name: told[name] for name in state() if name in told} == {
        name: value for name, value in state().items() if name in told
    }
    assert (told["alpha"], told["checkpoint_id"]) == (0.375, -1)
    assert row(layer, 0)["lifecycle_state"] == S.DORMANT
    assert layer.grafting["seed_id"].tolist() == [2]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0, S.DORMANT),
        (1, S.GRAFTING),
        (2, S.STABILIZATION),
        (3, S.ROLLED_BACK),
        (4, S.FOSSILIZED),
    ],
)
def test_a_version_1_record_has_a_phase_1_code(old: Path, code: int, expected: S) -> None:
    save(old, record_v1(code))
    told = row(layer_of(old), 2)
    assert told["lifecycle_state"] == expected
    assert told["alpha"] == (1.0 if expected in (S.STABILIZATION, S.FOSSILIZED) else 0.0)
    assert (told["blueprint_id"], told["epochs_in_state"]) == (1, 7)


def test_version_1_codes_are_kept_where_that_is_asked_for(old: Path) -> None:
    save(old, record_v1(2))
    assert row(layer_of(old, codes="identity"), 2)["lifecycle_state"] == S.TRAINING


def test_a_record_without_a_version_is_of_version_1(old: Path) -> None:
    made = record_v1(4)
    del made["version"]
    save(old, made)
    assert row(layer_of(old), 2)["lifecycle_state"] == S.FOSSILIZED


def test_a_phase_1_table_is_mapped_state_by_state(old: Path) -> None:
    rows, alpha = table()
    safetensors.torch.save_file(
        {"state_tensor": rows, "alpha_blend": alpha}, old / "encoder.3.safetensors"
    )
    layer = layer_of(old, "encoder.3")
    states = [S.DORMANT, S.GRAFTING, S.STABILIZATION, S.ROLLED_BACK, S.FOSSILIZED]
    assert layer.columns["lifecycle_state"].tolist() == states
    assert layer.columns["blueprint_id"].tolist() == [-1, 1, 1, 2, 1]
    assert layer.columns["alpha"].tolist() == [0, 0.25, 1, 0, 1]
    assert layer.columns["parent_state"].tolist() == [-1] * 5
    assert (layer.columns["transition_history"] == 0).all()


def test_a_bare_table_and_newer_records_of_its_layer_come_together(old: Path) -> None:
    torch.save(table()[0], old / "encoder.3_b.pt")
    save(old, record(seed_id=1))
    save(old, record(seed_id=6))
    layer = layer_of(old)
    assert layer.columns["lifecycle_state"].tolist() == [0, 3, 4, 10, 7, 0, 3]
    assert layer.columns["epochs_in_state"].tolist() == [4, 7, 9, 1, 60, 0, 7]


def test_the_newest_record_of_a_seed_wins(old: Path) -> None:
    older = save(old, record(timestamp=SECONDS - 100, state_data=state(epochs_in_state=1)))
    save(old, record(state_data=state(epochs_in_state=2)))
    done, log = imported(old)
    assert row(restore_layer(log, done.seq, "encoder.3_b"), 2)["epochs_in_state"] == 2
    outcomes = {report.file: report.outcome for report in done.files}
    assert outcomes.pop(older.name) == "superseded"
    assert list(outcomes.values()) == ["imported"]


def test_weights_of_imported_seeds_work_in_a_layer(old: Path) -> None:
    layer = LayerSeeds(8, 4, "encoder", blueprint_name="affine", hidden=2)
    for seed, code in ((1, 3), (3, 7)):
        weights = {n: torch.full(w.shape[1:], seed + 0.5) for n, w in layer.bank.weights.items()}
        values = state(lifecycle_state=code)
        save(old, record("encoder", seed, values, torch.nn.ParameterDict(weights).state_dict()))
    done, log = imported(old)
    restore_layer(log, done.seq, "encoder").load_into(layer)
    assert layer.state.host("alpha").tolist() == [0, 0.375, 0, 1]
    slots = layer.bank.slots(torch.tensor([1, 3]))
    for name, value in layer.bank.weights.items():
        assert value[slots].flatten(1).mean(1).tolist() == [1.5, 3.5], name
    x = torch.randn(5, 8)
    y = layer.blend(x, None)
    changed = [not torch.equal(y[:, i : i + 2], x[:, i : i + 2]) for i in range(0, 8, 2)]
    assert changed == [False, True, False, True]
    assert layer.bank.parked[slots].tolist() == [True, False]


def test_weights_of_another_blueprint_are_refused_and_change_nothing(old: Path) -> None:
    save(old, record("encoder", 1, state(), {"other": torch.ones(3)}))
    done, log = imported(old)
    layer = LayerSeeds(8, 2, "encoder", blueprint_name="affine", hidden=2)
    with pytest.raises(ConfigError, match=r"seed 1 of 'encoder' brought other \(3,\)"):
        restore_layer(log, done.seq, "encoder").load_into(layer)
    assert not layer.state.host("alpha").any()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "version 3": ({"version": 3}, "version 3, this program knows up to 2"),
    "version text": ({"version": "2"}, "version '2', which never was"),
    "version True": ({"version": True}, "version True"),
    "no layer": ({"layer_id": None}, "layer_id is None"),
    "seed of text": ({"seed_id": "2"}, "seed_id is '2'"),
    "seed too high": ({"seed_id": 10**6}, "seed_id is 1000000"),
    "negative seed": ({"seed_id": -1}, "seed_id is -1"),
    "no time": ({"timestamp": None}, "timestamp is None"),
    "NaN time": ({"timestamp": float("nan")}, "timestamp is nan"),
    "other id": ({"checkpoint_id": "x"}, "checkpoint_id is 'x'"),
    "state list": ({"state_data": []}, "state_data is a list"),
    "no state": ({"state_data": {}}, "no lifecycle_state"),
    "unknown state": ({"state_data": state(lifecycle_state=11)}, "lifecycle_state is 11"),
    "bool state": ({"state_data": state(lifecycle_state=True)}, "lifecycle_state is True"),
    "float epochs": ({"state_data": state(epochs_in_state=1.5)}, "epochs_in_state is 1.5"),
    "strategy": ({"state_data": state(grafting_strategy=99)}, "grafting_strategy is 99"),
    "alpha": ({"state_data": state(alpha_blend=1.5)}, "alpha is 1.5"),
    "metrics": ({"state_data": state(performance_metrics=[1, 2])}, "not four numbers"),
    "weights list": ({"blueprint_state": [torch.ones(1)]}, "blueprint_state is a list"),
    "weight number": ({"blueprint_state": {"w": 1}}, "'w' of its blueprint_state is a int"),
    "weight name": ({"blueprint_state": {7: torch.ones(1)}}, "the name 7"),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_record_with_a_bad_value_is_refused_alone(
    old: Path, changes: dict[str, Any], reason: str
) -> None:
    good = save(old, record(seed_id=0))
    stem = f"encoder.3_b_{changes.get('seed_id', 2)}_{int(SECONDS)}"
    torch.save(record() | changes, old / f"{stem}.pt")
    done, log = imported(old)
    told = {report.file: report for report in done.files}
    assert told[good.name].outcome == "imported"
    refused = told[f"{stem}.pt"]
    assert (refused.outcome, refused.layer) == ("refused", None)
    assert reason in refused.notes[0]
    assert len(restore_layer(log, done.seq, "encoder.3_b").columns["seed_id"]) == 1


@pytest.mark.parametrize(
    "name",
    [
        f"encoder.3_b_3_{int(SECONDS)}",
        f"other_2_{int(SECONDS)}",
        f"encoder.3_b_2_{int(SECONDS) + 60}",
        "encoder.3_b_2_x",
        "renamed",
    ],
)
def test_a_file_under_another_name_is_refused(old: Path, name: str) -> None:
    torch.save(record(), old / f"{name}.pt")
    with pytest.raises(MigrationError, match="its file is named"):
        imported(old)


def test_values_that_are_not_mapped_are_reported(old: Path) -> None:
    values = state(transition_history=[[1, 2]], checkpoint_id=5, colour="red")
    save(old, record(state_data=values | {"lifecycle_state": 2}))
    done, _ = imported(old)
    notes = " ".join(done.files[0].notes)
    for word in ("transition_history", "checkpoint_id", "colour", "alpha 0.375"):
        assert f"{word} is not mapped" in notes


def test_metrics_are_mapped(old: Path) -> None:
    save(old, record(state_data=state(performance_metrics=torch.tensor([0.5, 0.25, 1, 2]))))
    told = row(layer_of(old), 2)
    assert told["performance_metrics"] == [0.5, 0.25, 1, 2]
    assert told["metrics_valid"] == 15


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (torch.zeros(3, 5, dtype=torch.int32), r"shape \(3, 5\)"),
        (torch.zeros(3, 4), "no table of whole numbers"),
        (torch.full((1, 4), 5), "seed 0 has the lifecycle_state 5"),
        (torch.tensor([[0, -2, 0, 0]]), "seed 0 has the blueprint_id -2"),
        (torch.zeros(0, 4, dtype=torch.int64), r"shape \(0, 4\)"),
    ],
)
def test_a_bad_phase_1_table_is_refused(old: Path, rows: torch.Tensor, reason: str) -> None:
    torch.save({"state_tensor": rows}, old / "a.pt")
    with pytest.raises(MigrationError, match=reason):
        imported(old)


def test_pt_files_are_not_opened_without_being_allowed(old: Path) -> None:
    (old / "a.pt").write_bytes(b"anything")
    with pytest.raises(UnsafeInputError, match=r"holds 1 \.pt files, which are pickles"):
        import_folder(old, Root.open(str(old.parent / "new")))
    assert not (old.parent / "new").exists()


def test_nothing_is_imported_over_what_is_stored(old: Path) -> None:
    save(old, record())
    imported(old)
    with pytest.raises(ConfigError, match="something is stored"):
        imported(old)


def test_an_empty_or_missing_folder_is_refused(old: Path) -> None:
    with pytest.raises(MigrationError, match="nothing in"):
        imported(old)
    with pytest.raises(ConfigError, match="cannot be read"):
        imported(old / "absent")


def test_a_link_is_not_followed(old: Path, tmp_path: Path) -> None:
    path = save(old, record())
    path.rename(tmp_path / "elsewhere.pt")
    path.symlink_to(tmp_path / "elsewhere.pt")
    with pytest.raises(MigrationError, match="not a regular file"):
        imported(old)


def test_a_layer_that_was_not_imported_is_named(old: Path) -> None:
    save(old, record())
    done, log = imported(old)
    with pytest.raises(CorruptError, match="layer/other/state"):
        restore_layer(log, done.seq, "other")


def test_imported_columns_are_of_the_present_schema(old: Path) -> None:
    save(old, record())
    layer = layer_of(old)
    assert layer.columns["transition_count"].dtype == np.int16
