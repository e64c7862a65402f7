"""The newest snapshot in a peer's memory: a plain object and an actor, with one interface."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esper_ray.actors.peers import Peer
from esper_ray.errors import CorruptError, StorageUnavailable
from esper_ray.storage import CheckpointManager, MemoryReplica, ShardId, WritableReplica
from esper_ray.storage.group_commit import CommitPolicy
from tests.storage.layer_cases import LAYER, SCHEMA, blueprint, rows_of, same

SEEDS = 40
ROWS = rows_of(np.arange(SEEDS))


def save(folder: Path, replica: WritableReplica) -> str:
    """One snapshot and one seed's checkpoint, whose id is returned."""
    given: dict[str, Any] = {"schema": SCHEMA, "shard": ShardId.whole(SEEDS)}
    policy = CommitPolicy(interval_s=0.0)
    with CheckpointManager(
        folder, layer_id=LAYER, **given, policy=policy, replicas=[replica]
    ) as manager:
        manager.save_layer(ROWS, step=3).wait()
        saved = manager.save_checkpoint(LAYER, 4, {"lifecycle": 9}, blueprint(2.0))
    return str(saved)


def check_restores(folder: Path, saved: str, replica: WritableReplica) -> None:
    """Without its segments the root is of no use, with the replica all is as it was."""
    shutil.rmtree(folder / "segments")
    for path in (folder / "layers").rglob("*.json"):
        path.write_bytes(b"{}")
    alone = CheckpointManager(folder, layer_id=LAYER)
    with pytest.raises(CorruptError):
        alone.restore_checkpoint(saved, "cpu")
    reader = CheckpointManager(folder, layer_id=LAYER, replicas=[replica])
    assert same(reader.restore_layer(step=3), ROWS)
    found = reader.restore_checkpoint(saved, "cpu")
    assert torch.equal(found["blueprint_state"]["w"], blueprint(2.0)["w"])
    assert {*reader.reader.source.report.replaced.values()} == {replica.url}


def test_a_layer_is_restored_from_what_a_peer_holds(tmp_path: Path) -> None:
    replica = MemoryReplica()
    check_restores(tmp_path, save(tmp_path, replica), replica)


def test_bytes_of_a_peer_are_checked_like_those_of_a_root(tmp_path: Path) -> None:
    class Liar(MemoryReplica):
        answer: Any = b"x"

        def read(self, path: str, limit: int) -> bytes:
            data = super().read(path, limit)
            return self.answer(data) if callable(self.answer) else self.answer  # type: ignore[no-any-return]

    liar = Liar()
    saved = save(tmp_path, liar)
    shutil.rmtree(tmp_path / "segments")
    changed = (b"x", None, "text", lambda d: d + b" ", lambda d: d[:-1] + b"?", lambda d: [*d])
    for liar.answer in changed:
        reader = CheckpointManager(tmp_path, layer_id=LAYER, replicas=[liar])
        with pytest.raises(CorruptError):
            reader.restore_checkpoint(saved, "cpu")
        with pytest.raises(CorruptError):
            reader.restore_layer(step=3)


def test_a_peer_that_fails_costs_its_help_and_no_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Lost(MemoryReplica):
        def read(self, path: str, limit: int) -> bytes:
            raise ConnectionResetError(path, limit)

        def replace(self, path: str, data: bytes) -> None:
            raise StorageUnavailable(f"{path}: {len(data)} bytes are not wanted")

    saved = save(tmp_path, Lost())
    assert "does not hold" in caplog.text
    shutil.rmtree(tmp_path / "segments")
    lost = [Lost()]
    with pytest.raises(CorruptError, match="is missing"):
        CheckpointManager(tmp_path, layer_id=LAYER, replicas=lost).restore_checkpoint(saved, "cpu")


def test_a_peer_holds_the_newest_and_no_more_than_it_may() -> None:
    replica = MemoryReplica(limit=10)
    for name in "abc":
        replica.replace(name, b"1234")
    replica.replace("c", b"12345")
    assert replica.read("c", 5) == b"12345"
    assert replica.read("b", 4) == b"1234"
    for name, limit in (("a", 9), ("c", 4), ("d", 9)):
        with pytest.raises(FileNotFoundError):
            replica.read(name, limit)


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_a_layer_is_restored_from_the_memory_of_an_actor(tmp_path: Path, ray_cluster: str) -> None:
    import ray

    assert ray_cluster
    peer = Peer.start(num_cpus=0)
    saved = save(tmp_path, peer)
    check_restores(tmp_path, saved, peer)
    ray.kill(peer.actor.handle)
    until = time.monotonic() + 60
    while time.monotonic() < until:  # a call may still be answered meanwhile
        try:
            peer.read("segments", 1)
        except StorageUnavailable:
            break
        except FileNotFoundError:
            time.sleep(0.05)
    with pytest.raises(CorruptError):
        CheckpointManager(tmp_path, layer_id=LAYER, replicas=[peer]).restore_checkpoint(
            saved, "cpu"
        )
