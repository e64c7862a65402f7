"""Whole layers in their logs: snapshots and deltas, shards, damage, and other readers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_ray.errors import CheckpointNotFound, ConfigError, CorruptError
from esper_ray.storage import (
    CheckpointManager,
    LayerSchema,
    ManifestRef,
    Root,
    Rows,
    ShardId,
    compaction,
    layer_manifest,
    manifest,
)
from esper_ray.storage.group_commit import CommitPolicy
from esper_ray.storage.layer_rows import newest
from tests.storage.layer_cases import LAYER, SCHEMA, rows_of, same

SEEDS = 300
EVERYONE = np.arange(SEEDS)


def writer(root: Root | str, seeds: int = SEEDS, **given: Any) -> CheckpointManager:
    values: dict[str, Any] = {"schema": SCHEMA, "shard": ShardId.whole(seeds)}
    policy = CommitPolicy(interval_s=0.0, retry_s=0.2)
    return CheckpointManager(root, layer_id=LAYER, policy=policy, **{**values, **given})


def reader(root: Root | str) -> CheckpointManager:
    return CheckpointManager(root, layer_id=LAYER)


def test_a_layer_comes_back_whole_and_in_part(root: Root) -> None:
    rows = rows_of(EVERYONE)
    with writer(root) as manager:
        manager.save_layer(rows, step=7).wait(timeout=20)
    assert same(reader(root).restore_layer(), rows)
    for wanted in ([0], [5, 299], list(range(60, 200)), list(EVERYONE)):
        found = reader(root).restore_layer(step=7, seed_ids=np.array(wanted))
        assert same(found, rows.keep(np.array(wanted)))
    with pytest.raises(IndexError, match=r"0\.\.299 only"):
        reader(root).restore_layer(seed_ids=np.array([300]))


@settings(max_examples=12, deadline=None)
@given(
    changes=st.lists(
        st.tuples(st.sets(st.integers(0, 79), min_size=1, max_size=8), st.booleans()), max_size=25
    )
)
def test_the_newest_row_of_every_seed_wins_however_deltas_are_merged(
    changes: list[tuple[set[int], bool]],
) -> None:
    root = Root.open(f"memory://{np.random.default_rng().integers(2**60)}/run")
    rows = rows_of(range(80))
    with writer(root, seeds=80) as manager:
        futures = [manager.save_layer(rows, step=0)]
        for number, (ids, weights) in enumerate(changes):
            changed = rows_of(sorted(ids), seed=number + 1, weights=weights)
            rows = newest([rows, changed])
            futures.append(manager.save_layer(changed, step=number + 1))
        for future in futures:
            future.wait(timeout=20)
    assert same(reader(root).restore_layer(), rows)
    for seed in (0, 41, 79):
        found = reader(root).restore_layer(seed_ids=np.array([seed]))
        assert same(found, rows.keep(np.array([seed])))


def levels(root: Root | str) -> list[tuple[str, int]]:
    [head] = reader(root).reader.cut()
    return sorted({(segment.level, segment.seq) for segment in head.layer_state})


def test_more_than_sixteen_deltas_become_one_and_large_ones_a_new_snapshot(tmp_path: Path) -> None:
    root, many = str(tmp_path), 4_000
    rows = rows_of(range(many))
    with writer(root, seeds=many) as manager:
        manager.save_layer(rows, step=0).wait(timeout=20)
        for number in range(compaction.MAX_DELTAS + 1):
            changed = rows_of([number, number + 6], seed=number + 1)
            rows = newest([rows, changed])
            manager.save_layer(changed, step=number + 1).wait(timeout=20)
            if number == compaction.MAX_DELTAS - 1:
                assert len(levels(root)) == 1 + compaction.MAX_DELTAS
        assert levels(root) == [("delta", 18 + 1), ("full", 2)]
        assert same(reader(root).restore_layer(), rows)
        changed = rows_of(range(0, many, 2), seed=99)
        rows = newest([rows, changed])
        manager.save_layer(changed, step=50).wait(timeout=20)
        assert levels(root) == [("full", 20)]
    assert same(reader(root).restore_layer(), rows)
    assert same(reader(root).restore_layer(step=0), rows_of(range(many)))


def test_seed_checkpoints_do_not_change_what_a_layer_restores(tmp_path: Path) -> None:
    rows = rows_of(EVERYONE)
    with writer(str(tmp_path)) as manager:
        manager.save_layer(rows, step=1)
        manager.save_checkpoint(LAYER, 3, {"lifecycle": 10})
        manager.flush()
    assert same(reader(str(tmp_path)).restore_layer(step=1), rows)


def test_an_heir_adds_changes_to_what_its_predecessor_stored(tmp_path: Path) -> None:
    rows, changed = rows_of(EVERYONE), rows_of([1, 2], seed=1)
    with writer(str(tmp_path)) as manager:
        manager.save_layer(rows, step=1)
    with writer(str(tmp_path)) as heir:
        assert not heir.needs_all
        heir.save_layer(changed, step=2).wait(timeout=20)
    assert same(reader(str(tmp_path)).restore_layer(), newest([rows, changed]))


# ---- shards --------------------------------------------------------------------------------------


def save_sharded(root: Root | str, rows: Rows, count: int, step: int, **given: Any) -> list[Any]:
    pins = []
    for shard in ShardId.of(SEEDS, count):
        with writer(root, shard=shard, **given) as manager:
            own = rows.keep(np.arange(shard.first, shard.stop))
            manager.save_layer(own, step=step).wait(timeout=20)
            pins.append(manager.pin())
    return pins


def test_four_shards_restore_onto_any_number(root: Root) -> None:
    rows = rows_of(EVERYONE)
    save_sharded(root, rows, 4, step=3)
    assert same(reader(root).restore_layer(), rows)
    for count in (1, 2, 3):
        parts = [
            reader(root).restore_layer(seed_ids=np.arange(shard.first, shard.stop))
            for shard in ShardId.of(SEEDS, count)
        ]
        assert [len(part) for part in parts] == [SEEDS // count] * count
        assert same(newest(parts), rows)


def test_the_pin_of_a_shard_is_what_was_flushed_last() -> None:
    with writer(Root.open("memory://pins-of-a-shard/run"), seeds=3) as manager:
        for number in range(100):
            manager.save_checkpoint(LAYER, 1, {"lifecycle": 1})
            manager.flush()
            assert manager.pin().seq == number + 2


def test_a_new_run_epoch_has_other_shards_and_leaves_the_old_one_alone(tmp_path: Path) -> None:
    root, rows, later = str(tmp_path), rows_of(EVERYONE), rows_of(EVERYONE, seed=1)
    pins = save_sharded(root, rows, 4, step=3)
    with writer(root, shard=ShardId(0, 2, 0, 150), run_epoch=2, parents=pins):
        assert same(reader(root).restore_layer(), rows)  # no snapshot there yet: its parents'
    save_sharded(root, later, 2, step=4, run_epoch=2)
    assert same(reader(root).restore_layer(), later)
    assert same(reader(root).restore_layer(pins=pins), rows)


def test_shards_restore_at_the_newest_step_that_all_have(tmp_path: Path) -> None:
    root, rows = str(tmp_path), rows_of(EVERYONE)
    save_sharded(root, rows, 3, step=3)
    with writer(root, shard=ShardId.of(SEEDS, 3)[1]) as ahead:
        ahead.save_layer(rows_of([120], seed=9), step=4).wait(timeout=20)
    assert same(reader(root).restore_layer(), rows)
    for step in (2, 4):
        with pytest.raises(CheckpointNotFound, match=f"step {step}"):
            reader(root).restore_layer(step=step)


def test_pins_of_another_manifest_are_corrupt(tmp_path: Path) -> None:
    [pin] = save_sharded(str(tmp_path), rows_of(EVERYONE), 1, step=3)
    wrong = ManifestRef(pin.run_epoch, pin.shard, pin.seq, "0" * 64)
    with pytest.raises(CorruptError, match="not the one that was pinned"):
        reader(str(tmp_path)).restore_layer(pins=[wrong])
    two = save_sharded(str(tmp_path / "two"), rows_of(EVERYONE), 2, step=3)
    with pytest.raises(CorruptError, match="hold seeds"):
        reader(str(tmp_path / "two")).restore_layer(pins=two[1:])


# ---- what cannot be ------------------------------------------------------------------------------


def test_rows_that_are_not_of_the_layer_fail_their_future(tmp_path: Path) -> None:
    with writer(str(tmp_path)) as manager:
        for rows, words in (
            (rows_of([1, 2]), "must hold all seeds"),
            (rows_of(range(1, SEEDS + 1)), "does not own"),
            (Rows({"state": rows_of(EVERYONE).tables["state"]}), "not the schema's"),
            (_with_doubles(rows_of(EVERYONE)), "metrics"),
        ):
            with pytest.raises(ConfigError, match=words):
                manager.save_layer(rows, step=1).wait(timeout=20)
            with pytest.raises(ConfigError):
                manager.flush()
        with pytest.raises(ConfigError, match="not -1"):
            manager.save_layer(rows_of(EVERYONE), step=-1)


def _with_doubles(rows: Rows) -> Rows:
    state = rows.tables["state"]
    state["metrics"] = state["metrics"].astype(np.float64)
    return rows


@pytest.mark.parametrize("where", ["segments", "layers"])
def test_damage_anywhere_is_found_before_use(tmp_path: Path, where: str) -> None:
    root, rows = str(tmp_path), rows_of(EVERYONE)
    with writer(root) as manager:
        manager.save_layer(rows, step=1)
    for path in sorted((tmp_path / where).rglob("*.*")):
        whole = path.read_bytes()
        for at in np.linspace(0, len(whole) - 1, 25, dtype=int):
            data = bytearray(whole)
            data[at] ^= 1
            path.write_bytes(bytes(data))
            _restores_or_refuses(root, rows)
        for cut in (0, 1, len(whole) - 1):
            path.write_bytes(whole[:cut])
            _restores_or_refuses(root, rows)
        path.unlink()
        _restores_or_refuses(root, rows)
        path.write_bytes(whole)


def _restores_or_refuses(root: str, rows: Rows) -> None:
    """The open manifest, or bytes that a piece does not read, may be damaged and nothing lost."""
    for ids in (None, np.array([70])):
        try:
            found = reader(root).restore_layer(seed_ids=ids)
        except (CorruptError, CheckpointNotFound):
            continue
        assert same(found, rows if ids is None else rows.keep(ids))


def test_a_damaged_step_is_passed_over_for_the_one_before_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, older, newer = str(tmp_path), rows_of(EVERYONE), rows_of(EVERYONE, seed=1)
    with writer(root) as manager:
        manager.save_layer(older, step=1).wait(timeout=20)
        manager.save_layer(newer, step=2).wait(timeout=20)
    [head] = reader(root).reader.cut()
    for segment in head.layer_state:
        (tmp_path / segment.ref.path).unlink()
    assert same(reader(root).restore_layer(), older)
    assert "step 2 is damaged and is passed over" in caplog.text
    with pytest.raises(CorruptError, match="missing"):
        reader(root).restore_layer(step=2)
    for path in stored(tmp_path, "arrow"):
        path.unlink()
    with pytest.raises(CorruptError, match="missing"):
        reader(root).restore_layer()


# ---- other readers -------------------------------------------------------------------------------


def stored(root: Path, suffix: str) -> list[Path]:
    return sorted((root / "segments").rglob(f"*.{suffix}"))


def test_seed_state_is_read_by_pyarrow_pandas_and_duckdb_alone(tmp_path: Path) -> None:
    rows = rows_of(EVERYONE)
    with writer(str(tmp_path)) as manager:
        manager.save_layer(rows, step=1)
    tables = [
        pa.ipc.open_file(io.BytesIO(p.read_bytes())).read_all() for p in stored(tmp_path, "arrow")
    ]
    [state] = [table for table in tables if "lifecycle" in table.column_names]
    assert state.column("seed_id").to_pylist() == list(EVERYONE)
    assert state.column("lifecycle").to_pylist() == rows.tables["state"]["lifecycle"].tolist()
    frame = state.to_pandas()
    assert frame.set_index("seed_id").lifecycle[7] == rows.tables["state"]["lifecycle"][7]
    found = duckdb.connect().execute("select lifecycle from state where seed_id = 7").fetchall()
    assert found == [(rows.tables["state"]["lifecycle"][7],)]


def test_weights_are_read_by_safetensors_alone_a_block_in_one_range(
    tmp_path: Path,
) -> None:
    rows = rows_of(EVERYONE)
    with writer(str(tmp_path)) as manager:
        manager.save_layer(rows, step=1)
    [path] = stored(tmp_path, "safetensors")
    tensors = safetensors.torch.load(path.read_bytes())
    blocks = sorted({name.partition("/")[0] for name in tensors})
    assert blocks == ["b00000", "b00001", "b00002"]
    for part in ("seed_id", "w", "steps", "h"):
        joined = torch.cat([tensors[f"{block}/{part}"] for block in blocks])
        assert torch.equal(joined, rows.tensors["weights"][part])
    [head] = reader(str(tmp_path)).reader.cut()
    [weights] = [segment for segment in head.layer_state if segment.part == "weights"]
    size = sum(value.nbytes for name, value in tensors.items() if name.startswith("b00001/"))
    assert [(piece.rows, piece.length) for piece in weights.pieces[1:2]] == [(64, size)]


def test_manifests_are_canonical_and_name_all_that_they_need(tmp_path: Path) -> None:
    with writer(str(tmp_path)) as manager:
        manager.save_layer(rows_of(EVERYONE), step=1)
        manager.save_layer(rows_of([4]), step=2)
        manager.flush()
    key = layer_manifest.layer_key(LAYER)
    folder = tmp_path / "layers" / key / "e00000001" / "s0000"
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"{seq:020d}.json" for seq in (1, 2, 3)]
    bodies = [manifest.decode((folder / name).read_bytes()) for name in names]
    assert [body["kind"] for body in bodies] == ["open", "shard", "shard"]
    for body in bodies:
        assert all((tmp_path / ref.path).is_file() for ref in manifest.segments(body))
    assert [name.split("/")[1] for name in bodies[2]["own"]] == ["delta", "delta"]
    assert bodies[2]["parent"][0]["seq"] == 2


def test_a_schema_comes_back_from_json_and_a_forged_one_is_refused() -> None:
    again = LayerSchema.from_json(SCHEMA.to_json())
    assert again.to_json() == SCHEMA.to_json()
    forged: list[object] = [
        None,
        {},
        {"tables": {}, "tensors": {}},
        {"tables": {"state": [["a", "object", 0]]}, "tensors": {}},
        {"tables": {"state": [["a", "int32", 2**40]]}, "tensors": {}},
        {"tables": {"state": [["../a", "int32", 0]]}, "tensors": {}},
        {"tables": {"state": []}, "tensors": {"w": [["a", "float32", [2**40, 2**40]]]}},
        {"tables": {"state": []}, "tensors": {"w": [["a", "evil", [1]]]}},
        {"tables": {"state": [["a", "int32", 0], ["a", "int32", 0]]}, "tensors": {}},
    ]
    for value in forged:
        with pytest.raises(CorruptError, match="schema"):
            LayerSchema.from_json(value)
