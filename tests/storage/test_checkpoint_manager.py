"""Checkpoints of single seeds: what was saved comes back, or a typed error says why not."""

from __future__ import annotations

import pickle
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esper_ray.errors import (
    BackpressureError,
    CheckpointNotFound,
    ConfigError,
    CorruptError,
    FencedError,
    StorageUnavailable,
    StoreTimeout,
)
from esper_ray.storage import CheckpointId, CheckpointManager, Root, ShardId
from esper_ray.storage.group_commit import CommitPolicy
from esper_ray.storage.layer_rows import newest
from tests.storage.layer_cases import LAYER, SCHEMA, FaultyRoot, blueprint, rows_of, same

SEEDS = 40
QUICK = CommitPolicy(interval_s=0.0, retry_s=0.2)


def writer(root: Root | str, **given: Any) -> CheckpointManager:
    values: dict[str, Any] = {"schema": SCHEMA, "shard": ShardId.whole(SEEDS), "policy": QUICK}
    return CheckpointManager(root, layer_id=LAYER, **{**values, **given})


def test_a_checkpoint_comes_back_in_another_manager_by_its_id(root: Root) -> None:
    state = {"lifecycle": 3, "metrics": [1.5, 2, 3, 4], "grafting": {"pauses": 7}}
    with writer(root) as manager:
        saved = manager.save_checkpoint(LAYER, 5, state, blueprint(2.0))
        bare = manager.save_checkpoint(LAYER, 6, {"lifecycle": np.int64(4)})
        manager.flush()
    reader = CheckpointManager(root, layer_id=LAYER)
    found = reader.restore_checkpoint(str(saved), "cpu")
    assert found["state_data"] == state
    assert found["blueprint_state"].keys() == blueprint(2.0).keys()
    assert all(torch.equal(v, blueprint(2.0)[n]) for n, v in found["blueprint_state"].items())
    assert (found["version"], found["layer_id"], found["seed_id"]) == (3, LAYER, 5)
    assert found["metadata"] == {
        "pytorch_version": torch.__version__,
        "cuda_version": torch.version.cuda,
    }
    assert abs(found["timestamp"] - time.time()) < 60
    again = reader.restore_checkpoint(bare, torch.device("cpu"))
    assert again["state_data"] == {"lifecycle": 4, "metrics": [0.0] * 4, "grafting": None}
    assert again["blueprint_state"] is None


def test_columns_that_are_not_given_are_as_born(tmp_path: Path) -> None:
    with writer(str(tmp_path)) as manager:
        saved = manager.save_checkpoint(LAYER, 0, {})
        assert manager.restore_checkpoint(saved, "cpu")["state_data"]["lifecycle"] == -1


def test_saves_of_one_seed_in_one_group_are_all_kept(tmp_path: Path) -> None:
    with writer(str(tmp_path), policy=CommitPolicy(interval_s=5.0)) as manager:
        ids = [manager.save_checkpoint(LAYER, 1, {"lifecycle": n}, blueprint(n)) for n in range(9)]
        assert len(set(ids)) == 9
        assert {i.seq for i in ids} == {2}
        held = [manager.restore_checkpoint(i, "cpu")["state_data"]["lifecycle"] for i in ids]
        assert held == list(range(9))  # accepted, not stored yet
    reader = CheckpointManager(str(tmp_path), layer_id=LAYER)
    for number, saved in enumerate(ids):
        found = reader.restore_checkpoint(saved, "cpu")
        assert found["state_data"]["lifecycle"] == number
        assert found["blueprint_state"]["steps"] == number


def test_a_copy_is_taken_before_the_save_returns(tmp_path: Path) -> None:
    weights = blueprint(1.0)
    with writer(str(tmp_path), policy=CommitPolicy(interval_s=5.0)) as manager:
        saved = manager.save_checkpoint(LAYER, 1, {}, weights)
        weights["w"].zero_()
    found = CheckpointManager(str(tmp_path), layer_id=LAYER).restore_checkpoint(saved, "cpu")
    assert torch.equal(found["blueprint_state"]["w"], torch.ones(2, 3))


def test_the_future_of_a_save_names_how_far_it_is(tmp_path: Path) -> None:
    with writer(str(tmp_path), policy=CommitPolicy(interval_s=60.0)) as manager:
        future = manager.save_checkpoint(LAYER, 1, {}).future
        assert future is not None
        assert not future.done()
        assert str(future.level) == "accepted"
        with pytest.raises(StoreTimeout, match=r"after 0\.01 s"):
            future.wait(timeout=0.01)
        with pytest.raises(ConfigError, match="durable-object"):
            manager.flush("durable-object")
        manager.flush("durable-local")
        assert future.done()
        assert future.level == "durable-local"
        assert future.exception() is None


def test_an_id_pickles_as_the_text_that_it_is(tmp_path: Path) -> None:
    with writer(str(tmp_path)) as manager:
        saved = manager.save_checkpoint(LAYER, 17, {})
    again = pickle.loads(pickle.dumps(saved))
    assert (again, again.seed_id, again.future) == (str(saved), 17, None)


@pytest.mark.parametrize(
    "text",
    ["", "encoder.3_5_17", "../../etc/passwd", "0" * 16 + "-1-1-2-0", "f" * 16 + "-1-1--2-0"],
)
def test_an_id_that_nobody_saved_is_not_found(tmp_path: Path, text: str) -> None:
    with writer(str(tmp_path)) as manager:
        saved = manager.save_checkpoint(LAYER, 5, {})
        for wrong in (text, saved[:-1] + "1", saved.replace("-5-", "-6-"), saved[:16] + "-5-2-2-0"):
            with pytest.raises(CheckpointNotFound, match="Checkpoint not found"):
                manager.restore_checkpoint(wrong, "cpu")
            with pytest.raises(ValueError, match="Checkpoint not found"):
                CheckpointManager(str(tmp_path), layer_id=LAYER).restore_checkpoint(wrong, "cpu")


@pytest.mark.parametrize(
    ("seed_id", "state", "weights", "words"),
    [
        (SEEDS, {}, None, "not in 0..39"),
        (-1, {}, None, "not in 0..39"),
        (True, {}, None, "not in 0..39"),
        (1, {"age": 3}, None, "no column 'age'"),
        (1, {"lifecycle": 2**31}, None, "int32 cannot hold 2147483648"),
        (1, {"lifecycle": 1.5}, None, "cannot hold 1.5"),
        (1, {"lifecycle": "three"}, None, "cannot hold 'three'"),
        (1, {"metrics": [1, 2, 3]}, None, "4 values, not 3"),
        (1, {"metrics": 1.0}, None, "4 values, not 1"),
        (1, {"grafting": {}}, None, "lacks"),
        (1, {"grafting": {"pauses": 256}}, None, "uint8 cannot hold 256"),
        (1, {"grafting": 4}, None, "'grafting' of a checkpoint is 4"),
        (1, {}, {"w": torch.ones(2, 3)}, "has the tensors"),
        (1, {}, {**blueprint(1.0), "w": torch.ones(3, 2)}, r"\(3, 2\)"),
        (1, {}, {**blueprint(1.0), "steps": torch.tensor(1.0)}, "float32"),
        (1, {}, {**blueprint(1.0), "steps": 4}, "is 4"),
    ],
)
def test_what_cannot_be_stored_is_named_and_nothing_is_saved(
    tmp_path: Path, seed_id: int, state: dict[str, Any], weights: Any, words: str
) -> None:
    with writer(str(tmp_path)) as manager:
        with pytest.raises(ConfigError, match=words):
            manager.save_checkpoint(LAYER, seed_id, state, weights)
        with pytest.raises(ConfigError, match=r"not 'decoder\.1'"):
            manager.save_checkpoint("decoder.1", 1, {})
        manager.flush()
        assert manager.stats()["accepted"] == 0


def test_a_manager_without_a_shard_only_restores(tmp_path: Path) -> None:
    reader = CheckpointManager(str(tmp_path), layer_id=LAYER)
    with pytest.raises(ConfigError, match="only restores"):
        reader.save_checkpoint(LAYER, 1, {})
    with pytest.raises(ConfigError, match="both the schema"):
        CheckpointManager(str(tmp_path), layer_id=LAYER, schema=SCHEMA)
    with pytest.raises(CheckpointNotFound, match="no snapshot"):
        reader.restore_layer()


# ---- one writer ----------------------------------------------------------------------------------


def test_a_writer_that_was_replaced_is_fenced_and_nothing_of_it_shows(root: Root) -> None:
    zombie = writer(root)
    old = zombie.save_checkpoint(LAYER, 1, {"lifecycle": 1})
    zombie.flush()
    with writer(root) as heir:
        lost = zombie.save_checkpoint(LAYER, 1, {"lifecycle": 2})
        assert lost.future is not None
        with pytest.raises(FencedError):
            lost.future.wait(timeout=20)
        for _ in range(2):
            with pytest.raises(FencedError):
                zombie.save_checkpoint(LAYER, 1, {})
        new = heir.save_checkpoint(LAYER, 1, {"lifecycle": 3})
        heir.flush()
    with pytest.raises(FencedError):
        zombie.close()
    reader = CheckpointManager(root, layer_id=LAYER)
    assert reader.restore_checkpoint(old, "cpu")["state_data"]["lifecycle"] == 1
    assert reader.restore_checkpoint(new, "cpu")["state_data"]["lifecycle"] == 3


def test_an_older_incarnation_cannot_open_the_shard(tmp_path: Path) -> None:
    writer(str(tmp_path), incarnation=7).close()
    for older in (6, 7):
        with pytest.raises(FencedError, match="incarnation 7"):
            writer(str(tmp_path), incarnation=older)
    writer(str(tmp_path), incarnation=8).close()
    with pytest.raises(FencedError, match="other columns"):
        writer(str(tmp_path), shard=ShardId(0, 2, 0, 20))


def test_a_shard_whose_numbers_are_used_up_is_not_opened(root: Root) -> None:
    with writer(root) as manager:
        saved = manager.save_checkpoint(LAYER, 2, {"lifecycle": 5})
    folder = f"layers/{saved.layer_key}/e00000001/s0000"
    root.create(f"{folder}/99999999999999999999.json", b"{}")
    before = threading.active_count()
    with pytest.raises(CorruptError, match="more than any run stores"):
        writer(root)
    assert threading.active_count() == before
    found = CheckpointManager(root, layer_id=LAYER).restore_checkpoint(saved, "cpu")
    assert found["state_data"]["lifecycle"] == 5


def test_saves_after_a_restart_hide_no_older_checkpoint(tmp_path: Path) -> None:
    ids: list[CheckpointId] = []
    for number in range(3):
        with writer(str(tmp_path)) as manager:
            ids.append(manager.save_checkpoint(LAYER, 2, {"lifecycle": number}))
    reader = CheckpointManager(str(tmp_path), layer_id=LAYER)
    found = [reader.restore_checkpoint(i, "cpu")["state_data"]["lifecycle"] for i in ids]
    assert found == [0, 1, 2]


# ---- a store that fails --------------------------------------------------------------------------


def test_a_store_that_is_behind_stops_saves_and_loses_none() -> None:
    root = FaultyRoot.new()
    with writer(root, policy=CommitPolicy(interval_s=0.0, pending=2)) as manager:
        root.gate.clear()
        ids = [manager.save_checkpoint(LAYER, n % SEEDS, {}, timeout=0.05) for n in range(1_001)]
        rest = (manager.save_checkpoint(LAYER, n % SEEDS, {}, timeout=0.05) for n in range(2_000))
        with pytest.raises(BackpressureError, match="2 groups"):
            ids.extend(rest)
        root.gate.set()
        manager.flush()
        assert manager.restore_checkpoint(ids[-1], "cpu")["seed_id"] == ids[-1].seed_id
        assert manager.stats()["pending"] == 0


def test_a_store_that_comes_back_gets_the_same_commit(tmp_path: Path) -> None:
    root = FaultyRoot.new()
    with writer(root, policy=CommitPolicy(interval_s=0.0, retry_s=20)) as manager:
        root.refusals = 3
        saved = manager.save_checkpoint(LAYER, 1, {"lifecycle": 5})
        manager.flush()
        assert manager.stats()["retries"] == 3
    found = CheckpointManager(root, layer_id=LAYER).restore_checkpoint(saved, "cpu")
    assert found["state_data"]["lifecycle"] == 5


def test_an_outage_is_raised_by_future_flush_and_next_save_and_loses_nothing() -> None:
    root = FaultyRoot.new()
    with writer(root) as manager:
        manager.save_layer(rows_of(range(SEEDS)), step=1)
        manager.flush()
        root.refusals = 10_000
        future = manager.save_layer(rows_of([1, 2], seed=2), step=2)
        with pytest.raises(StorageUnavailable):
            future.wait(timeout=20)
        with pytest.raises(StorageUnavailable):
            manager.save_checkpoint(LAYER, 1, {})
        later = manager.save_checkpoint(LAYER, 1, {"lifecycle": 3})
        with pytest.raises(StorageUnavailable):
            manager.flush()
        root.refusals = 0
        assert later.future is not None
        later.future.wait(timeout=20)
        assert future.wait(timeout=20) == "durable-object"  # stored after all
        assert manager.stats()["failed"] == 1
    reader = CheckpointManager(root, layer_id=LAYER)
    expected = newest([rows_of(range(SEEDS)), rows_of([1, 2], seed=2)])
    assert same(reader.restore_layer(), expected)
    assert reader.restore_checkpoint(later, "cpu")["state_data"]["lifecycle"] == 3


def test_after_changes_that_could_not_be_encoded_all_rows_are_needed() -> None:
    root = FaultyRoot.new()
    with writer(root) as manager:
        manager.save_layer(rows_of(range(SEEDS)), step=1)
        with pytest.raises(ConfigError, match="does not own"):
            manager.save_layer(rows_of([SEEDS]), step=2).wait(timeout=20)
        with pytest.raises(ConfigError, match="does not own"):
            manager.flush()
        needed = manager.needs_all
        assert needed
        with pytest.raises(ConfigError, match="must hold all seeds 0 to 39"):
            manager.save_layer(rows_of([3]), step=3).wait(timeout=20)
        with pytest.raises(ConfigError, match="must hold all"):
            manager.flush()
        manager.save_layer(rows_of(range(SEEDS), seed=3), step=4).wait(timeout=20)
        assert not manager.needs_all
        assert manager.reader.seqs(1, 0) == [1, 2, 3, 4, 5]  # no number is left out


def test_closing_waits_for_the_store_and_raises_what_it_could_not_do() -> None:
    root = FaultyRoot.new()
    manager = writer(root, policy=CommitPolicy(interval_s=0.0, retry_s=60))
    root.refusals = 3
    saved = manager.save_checkpoint(LAYER, 1, {})
    manager.close()
    assert saved.future is not None
    assert saved.future.done()
    manager = writer(root, policy=CommitPolicy(interval_s=0.0, retry_s=60))
    root.gate.clear()
    manager.save_checkpoint(LAYER, 1, {})
    with pytest.raises(StoreTimeout, match="not stored after"):
        manager.close(timeout=0.05)
    root.gate.set()
    manager.close()
    policy = CommitPolicy(interval_s=0.0, timeout_s=0.1, retry_s=0.0)
    failing, fault = writer(root, policy=policy), KeyError("the step failed")
    root.refusals = 10_000
    lost = failing.save_checkpoint(LAYER, 1, {})
    assert lost.future is not None
    with pytest.raises(StorageUnavailable):
        lost.future.wait(timeout=20)
    failing.__exit__(KeyError, fault, None)
    root.refusals = 0
    assert "could not be committed either" in fault.__notes__[0]


# ---- damage and copies ---------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def test_a_damaged_checkpoint_is_refused_and_taken_from_the_root_where_a_copy_is_damaged(
    tmp_path: Path,
) -> None:
    near, far = tmp_path / "near", tmp_path / "far"
    with writer(str(far), local_root=str(near)) as manager:
        saved = manager.save_checkpoint(LAYER, 4, {"lifecycle": 9}, blueprint(3.0))
    for path in (near / "segments").rglob("*.*"):
        flip(path)
    reader = CheckpointManager(str(far), layer_id=LAYER, local_root=str(near))
    assert reader.restore_checkpoint(saved, "cpu")["state_data"]["lifecycle"] == 9
    for path in (far / "segments").rglob("*.*"):
        flip(path)
    for cache in (None, str(near)):
        damaged = CheckpointManager(str(far), layer_id=LAYER, local_root=cache)
        with pytest.raises(CorruptError):
            damaged.restore_checkpoint(saved, "cpu")


def test_saves_are_durable_in_the_near_root_first_and_go_on_to_the_far_one(tmp_path: Path) -> None:
    far = FaultyRoot.new()
    manager = writer(far, local_root=str(tmp_path), policy=CommitPolicy(0.0, retry_s=0.0))
    far.refusals = 10_000
    saved = manager.save_checkpoint(LAYER, 4, {"lifecycle": 9}, blueprint(3.0))
    assert saved.future is not None
    assert saved.future.wait("durable-local", 20) == "durable-local"
    with pytest.raises(StorageUnavailable):
        saved.future.wait("durable-object", 20)
    with pytest.raises(StorageUnavailable):
        manager.close(timeout=0.1)
    far.refusals = 0
    with writer(far, local_root=str(tmp_path)) as heir:  # brings up what only the disk has
        found = CheckpointManager(far, layer_id=LAYER).restore_checkpoint(saved, "cpu")
        assert found["state_data"]["lifecycle"] == 9
        later = heir.save_checkpoint(LAYER, 4, {})
        assert later.future is not None
        assert later.future.wait(timeout=20) == "durable-object"


@pytest.mark.parametrize("damaged", ["segments", "layers"])
def test_a_damaged_rest_on_the_disk_is_left_there_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: str
) -> None:
    far = FaultyRoot.new()
    manager = writer(far, local_root=tmp_path, policy=CommitPolicy(0.0, retry_s=0.0))
    far.refusals = 10_000
    saved = manager.save_checkpoint(LAYER, 4, {"lifecycle": 3})
    assert saved.future is not None
    saved.future.wait("durable-local", 20)
    with pytest.raises(StorageUnavailable):
        manager.close(timeout=0.1)
    for path in (tmp_path / damaged).rglob("*.*"):
        flip(path)
    far.refusals = 0
    with writer(far, local_root=tmp_path) as heir:
        assert "cannot be brought to" in caplog.text
        heir.save_checkpoint(LAYER, 4, {})
        heir.flush("durable-object")
    with pytest.raises(ConfigError, match="not a folder of this machine"):
        CheckpointManager(str(tmp_path), layer_id=LAYER, local_root=far)
