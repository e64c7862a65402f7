"""What older versions stored is read today as on the day when it was first read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esper_ray.actors import persistence
from esper_ray.actors.persistence import decode_state, layer_name, read_tables
from esper_ray.errors import CorruptError, MigrationError, TooNewError
from esper_ray.growth import snapshot, state_versions
from esper_ray.growth.state_versions import NEWEST, SCHEMAS, STEPS, StoredLayer
from esper_ray.layers import LayerSeeds
from esper_ray.legacy.archive import check_archive
from esper_ray.legacy.importing import import_folder
from esper_ray.legacy.loading import PtLoader
from esper_ray.legacy.restoring import restore_layer
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.storage import Root, RunCheckpoints, RunLog, codec, manifest
from esper_ray.storage.migrations import migrate
from tests.golden.make import HERE, LAYER, RECORDS, ROOT, TABLES, layer, plain

ROWS = {"state_v1.arrow": 5, "state_v2.arrow": 11}


def read() -> dict[str, Any]:
    """The rows that golden tables hold, in the present form."""
    return {name: plain(decode_state(_bytes(name), rows)[0]) for name, rows in ROWS.items()}


def _bytes(name: str) -> bytes:
    return (HERE / name).read_bytes()


def test_golden_tables_are_read_as_ever() -> None:
    assert read() == json.loads((HERE / "expected.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "version"), [("state_v1.arrow", 1), ("state_v2.arrow", 2)])
def test_a_golden_table_is_of_its_version(name: str, version: int) -> None:
    assert codec.column_names(_bytes(name)) == list(SCHEMAS[version])
    assert decode_state(_bytes(name), ROWS[name])[1] == version
    made = codec.decode_table(TABLES[name](), SCHEMAS[version], ROWS[name])
    kept = codec.decode_table(_bytes(name), SCHEMAS[version], ROWS[name])
    assert plain(made) == plain(kept)


@pytest.mark.parametrize("name", ROWS)
def test_a_run_that_stored_an_old_table_loads_in_the_present_form(
    tmp_path: Path, name: str
) -> None:
    log = RunLog(Root.open(str(tmp_path)))
    log.open_epoch(None)
    ref = log.put_segment(layer_name("a", "state"), _bytes(name), "arrow", ROWS[name])
    log.commit(1, {"step": 0}, [ref])
    columns, grafting = read_tables(log, {ref.name: ref}, "a")
    snapshot.check_state_columns(columns, grafting, ROWS[name])
    assert {n: (v.dtype, v.shape[1] if v.ndim == 2 else 0) for n, v in columns.items()} == dict(
        snapshot.STATE_SCHEMA
    )
    in_grafting = np.flatnonzero(columns["lifecycle_state"] == S.GRAFTING)
    assert grafting["seed_id"].tolist() == in_grafting.tolist() != []


def test_golden_records_are_imported_as_ever(tmp_path: Path) -> None:
    root = Root.open(str(tmp_path))
    with PtLoader() as loader:
        done = import_folder(HERE, root, loader=loader)
    assert {report.file for report in done.files} == set(RECORDS)
    assert {report.outcome for report in done.files} == {"imported"}
    found = restore_layer(RunLog(root), done.seq, "encoder.3_b")
    assert found.columns["lifecycle_state"].tolist() == [0, 4, 3, 3]
    assert found.columns["epochs_in_state"].tolist() == [0, 7, 7, 7]
    assert found.columns["alpha"].tolist() == [0, 1, 0.375, 0.375]
    assert {n: t.tolist() for n, t in found.blueprints[2].items()} == {
        "up": [[0, 1, 2], [3, 4, 5]],
        "down": [1, 1],
    }


@pytest.mark.parametrize("name", RECORDS)
def test_golden_records_are_small_and_plain_archives(name: str) -> None:
    check_archive(_bytes(name))
    assert len(_bytes(name)) < 4_000


def test_a_golden_store_of_this_version_restores_bit_for_bit() -> None:
    log = RunLog(Root.open(str(ROOT)))
    assert RunCheckpoints(log).verify() == []
    body = log.read_commit(1)
    restored, made = LayerSeeds(8, 4, LAYER, blueprint_name="affine", hidden=2), layer()
    persistence.restore_layer(restored, log, {ref.name: ref for ref in manifest.segments(body)})
    assert plain(snapshot.state_columns(restored.state)) == plain(
        snapshot.state_columns(made.state)
    )
    for read_rows in (snapshot.grown_tensors, snapshot.rollback_tensors):
        one, other = read_rows(restored), read_rows(made)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------- the chain


def test_every_version_has_a_schema_and_a_step_to_the_next() -> None:
    assert list(SCHEMAS) == list(range(1, NEWEST + 1))
    assert list(STEPS) == list(range(1, NEWEST))


def test_steps_change_nothing_that_they_are_given() -> None:
    for name, rows in ROWS.items():
        version = list(ROWS).index(name) + 1
        table = codec.decode_table(_bytes(name), SCHEMAS[version], rows)
        before = plain(table)
        stored = StoredLayer(table)
        for number in range(version, NEWEST):
            new = STEPS[number](stored)
            assert list(new.table) == list(SCHEMAS[number + 1])
            stored = new
        assert plain(table) == before
        assert stored.told == {"migrated_from": version}


def test_migrating_at_once_and_in_steps_is_the_same() -> None:
    table = codec.decode_table(_bytes("state_v1.arrow"), SCHEMAS[1], 5)
    once = migrate(StoredLayer(table), 1, NEWEST, STEPS)
    halfway = migrate(StoredLayer(table), 1, 2, STEPS)
    assert plain(migrate(halfway, 2, NEWEST, STEPS).table) == plain(once.table)
    assert migrate(once, NEWEST, NEWEST, STEPS) is once


@pytest.mark.parametrize(
    ("version", "kind"),
    [
        (NEWEST + 1, TooNewError),
        (2**70, TooNewError),
        (0, MigrationError),
        (-1, MigrationError),
        (True, MigrationError),
        ("1", MigrationError),
        (None, MigrationError),
        (1.0, MigrationError),
    ],
)
def test_versions_that_are_not_known_are_refused(version: object, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        migrate(StoredLayer({}), version, NEWEST, STEPS)


def test_a_phase_1_table_with_an_unknown_state_is_refused() -> None:
    table: Mapping[str, Any] = codec.decode_table(_bytes("state_v1.arrow"), SCHEMAS[1], 5)
    table["lifecycle_state"][3] = 5
    with pytest.raises(MigrationError, match="seed 3 has the state 5"):
        state_versions.phase1_to_phase2(StoredLayer(dict(table)))


def test_a_table_of_no_known_version_is_named_by_its_columns() -> None:
    data = codec.encode_table({"seed_id": np.zeros(1, np.int32)})
    with pytest.raises(CorruptError, match=r"has columns \['seed_id'\]"):
        decode_state(data, 1)
