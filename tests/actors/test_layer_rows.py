"""A real layer in its log: staged while it trains, restored mid-graft, spread over other shards."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from esper_ray.actors.layer_rows import LayerStaging, layer_schema, load_rows, seed_record
from esper_ray.errors import ConfigError, StorageUnavailable
from esper_ray.growth import snapshot
from esper_ray.growth.stage import Stage
from esper_ray.layers import ChunkedKasminaLayer, LayerSeeds
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.storage import CheckpointManager, Rows, ShardId
from esper_ray.storage.group_commit import CommitPolicy
from esper_ray.storage.staging import StagingBuffers
from tests.builders import move, run_step, same_bits, stage_spec, walk
from tests.pages import blocks, python
from tests.storage.layer_cases import FaultyRoot

QUICK = CommitPolicy(interval_s=0.0)


def manager_of(url: Path, layer: LayerSeeds, shard: ShardId | None = None) -> CheckpointManager:
    return CheckpointManager(
        str(url),
        layer_id=layer.layer_id,
        schema=layer_schema(layer),
        shard=shard or ShardId.whole(layer.state.num_seeds),
        policy=QUICK,
    )


def rows_of(layer: LayerSeeds) -> Rows:
    staged = LayerStaging(layer).stage()
    assert staged is not None
    return staged()


def save_in_shards(url: Path, layer: LayerSeeds, count: int) -> None:
    rows = rows_of(layer)
    for shard in ShardId.of(layer.state.num_seeds, count):
        with manager_of(url, layer, shard) as manager:
            own = rows.keep(np.arange(shard.first, shard.stop))
            manager.save_layer(own, step=1).wait(timeout=20)


# ---- mid-graft -----------------------------------------------------------------------------------


def epoch(stage: Stage) -> list[Tensor]:
    losses = [loss for _ in range(stage.spec.epoch_steps) for loss in run_step(stage)]
    stage.end_epoch(stage.step // stage.spec.epoch_steps - 1)
    return losses


def grafting_stage() -> Stage:
    """A stage one of whose seeds is half blended in, and another is in training."""
    stage = Stage(stage_spec())
    walk(stage, [0, 1], S.TRAINING)
    epoch(stage)
    move(stage, [0], S.TRAINING, S.GRAFTING)
    epoch(stage)
    return stage


def layer_of(stage: Stage) -> LayerSeeds:
    [trainer] = stage.trainers.values()
    return trainer.layer


@pytest.mark.parametrize("shards", [1, 4])
def test_a_restore_in_the_middle_of_a_graft_goes_on_bit_for_bit(
    tmp_path: Path, shards: int
) -> None:
    stage = grafting_stage()
    layer = layer_of(stage)
    assert 0 < float(layer.state.alpha[0]) < 1
    save_in_shards(tmp_path, layer, shards)
    again = Stage(stage.spec)
    snapshot.load_host(again, {n: v.clone() for n, v in snapshot.host_tensors(stage).items()})
    stored = CheckpointManager(str(tmp_path), layer_id=layer.layer_id).restore_layer()
    load_rows(layer_of(again), stored)
    snapshot.resume_trainers(again, stage.step)
    for _ in range(3):
        assert all(map(same_bits, epoch(stage), epoch(again)))
    one, other = rows_of(layer), rows_of(layer_of(again))
    for part, tensors in one.tensors.items():
        assert all(same_bits(value, other.tensors[part][n]) for n, value in tensors.items())
    for part, table in one.tables.items():
        assert all(v.tobytes() == other.tables[part][n].tobytes() for n, v in table.items())


# ---- other numbers of shards ---------------------------------------------------------------------


SEEDS, CHUNK = 24, 3


def whole_numbers(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Small integers, so that sums are exact in whatever order they are made."""
    return torch.randint(-3, 4, shape, generator=random).float()


def grown_layer() -> ChunkedKasminaLayer:
    random = torch.Generator().manual_seed(5)
    host = nn.Linear(8, SEEDS * CHUNK)
    layer = ChunkedKasminaLayer(host, SEEDS, hidden=4, kernel="torch")
    walk(layer, [3, 9], S.TRAINING)
    walk(layer, [0, 7, 8, 23], S.GRAFTING)
    walk(layer, [11, 12, 17], S.STABILIZATION)
    with torch.no_grad():
        for weight in (host.weight, host.bias, *layer.bank.weights.values()):
            weight.copy_(whole_numbers(tuple(weight.shape), random))
        layer.state.alpha[[0, 7, 8, 23]] = 0.5
    layer.state.changed()
    layer.refresh()
    return layer


def shard_of(layer: ChunkedKasminaLayer, shard: ShardId, rows: Rows) -> ChunkedKasminaLayer:
    """A layer of this shard's features only, its seeds restored."""
    first, stop = shard.first * CHUNK, shard.stop * CHUNK
    host, whole = nn.Linear(8, stop - first), layer.base_layer
    assert isinstance(whole, nn.Linear)
    with torch.no_grad():
        host.weight.copy_(whole.weight[first:stop])
        host.bias.copy_(whole.bias[first:stop])
    small = ChunkedKasminaLayer(host, shard.stop - shard.first, hidden=4, kernel="torch")
    load_rows(small, rows.renumbered(-shard.first))
    return small


def test_a_layer_of_four_shards_restores_onto_one_two_and_three_with_equal_outputs(
    tmp_path: Path,
) -> None:
    layer = grown_layer()
    x = whole_numbers((5, 8), torch.Generator().manual_seed(1))
    wanted, bare = layer(x), layer.base_layer(x)
    assert not torch.equal(wanted, bare)
    save_in_shards(tmp_path, layer, 4)
    for count in (1, 2, 3):
        outputs = []
        for shard in ShardId.of(SEEDS, count):
            reader = CheckpointManager(str(tmp_path), layer_id=layer.layer_id)
            rows = reader.restore_layer(seed_ids=np.arange(shard.first, shard.stop))
            outputs.append(shard_of(layer, shard, rows)(x))
        assert torch.equal(torch.cat(outputs, -1), wanted)


def test_one_seed_of_a_layer_is_saved_and_comes_back(tmp_path: Path) -> None:
    layer = grown_layer()
    with manager_of(tmp_path, layer) as manager:
        ids = {
            seed: manager.save_checkpoint(layer.layer_id, seed, *seed_record(layer, seed))
            for seed in (0, 1, 11)
        }
    reader = CheckpointManager(str(tmp_path), layer_id=layer.layer_id)
    for seed, saved in ids.items():
        found = reader.restore_checkpoint(saved, "cpu")
        state, weights = seed_record(layer, seed)
        assert found["state_data"]["lifecycle_state"] == state["lifecycle_state"]
        assert found["state_data"]["alpha"] == state["alpha"]
        assert (found["state_data"]["grafting"] is not None) == (seed == 0)
        assert (found["blueprint_state"] is None) == (weights is None)
        if weights is not None:
            assert all(same_bits(v, found["blueprint_state"][n]) for n, v in weights.items())
    with pytest.raises(ConfigError, match=r"0\.\.23"):
        seed_record(layer, 24)


def test_the_example_of_the_page_works_as_it_is_written(tmp_path: Path) -> None:
    code = "\n".join(blocks("docs/storage-layers.md", "python"))
    assert python("-W", "error", "-c", code, folder=tmp_path) == "3 17 0\n"


# ---- staging -------------------------------------------------------------------------------------


def test_staged_rows_do_not_follow_the_live_ones(tmp_path: Path) -> None:
    layer = grown_layer()
    before = rows_of(layer)
    staging = LayerStaging(layer)
    staged = staging.stage()
    assert staged is not None
    walk(layer, [5], S.TRAINING)
    with torch.no_grad():
        for weight in layer.bank.weights.values():
            weight.zero_()
    with manager_of(tmp_path, layer) as manager:
        manager.save_layer(staged, step=1).wait(timeout=20)
        stored = manager.restore_layer()
    for part, tensors in before.tensors.items():
        assert all(same_bits(value, stored.tensors[part][n]) for n, value in tensors.items())
    assert np.array_equal(
        before.tables["state"]["lifecycle_state"], stored.tables["state"]["lifecycle_state"]
    )


def test_a_snapshot_without_a_free_buffer_is_left_out_and_counted(tmp_path: Path) -> None:
    layer = grown_layer()
    staging = LayerStaging(layer)
    held = [staging.stage() for _ in range(3)]
    with manager_of(tmp_path, layer) as manager:
        assert staging.save(manager, step=1) is None
        assert staging.buffers.refused == 1
        assert held[0] is not None
        held[0].release()
        held[0].release()
        future = staging.save(manager, step=2)
        assert future is not None
        future.wait(timeout=20)
        future = staging.save(manager, step=3)  # the buffers are free again once it is encoded
        assert future is not None
        future.wait(timeout=20)


def test_a_store_that_stalls_does_not_delay_the_step() -> None:
    layer, root = grown_layer(), FaultyRoot.new()
    manager = CheckpointManager(
        root,
        layer_id=layer.layer_id,
        schema=layer_schema(layer),
        shard=ShardId.whole(SEEDS),
        policy=CommitPolicy(interval_s=0.0, pending=2),
    )
    staging, longest, futures = LayerStaging(layer), 0.0, []
    root.gate.clear()
    for step in range(50):
        began = time.perf_counter()
        futures.append(staging.save(manager, step))
        longest = max(longest, time.perf_counter() - began)
    queued = [future for future in futures if future is not None]
    assert len(queued) == 2
    assert staging.buffers.refused == 48
    assert longest < 1.0
    root.gate.set()
    for future in queued:
        future.wait(timeout=20)
    manager.close()
    assert same_bits(
        manager.restore_layer().tensors["weights"]["w_in"],
        rows_of(layer).tensors["weights"]["w_in"],
    )


def test_a_save_that_is_refused_gives_its_buffers_back(tmp_path: Path) -> None:
    layer = grown_layer()
    staging = LayerStaging(layer)
    manager = manager_of(tmp_path, layer)
    manager.close()
    for _ in range(5):
        with pytest.raises(StorageUnavailable, match="closed"):
            staging.save(manager, step=1)
    assert staging.buffers.refused == 0


def test_buffers_are_used_again_and_made_anew_where_a_tensor_has_grown() -> None:
    buffers = StagingBuffers(count=1)
    seen = []
    for length in (3, 3, 5):
        source = torch.arange(float(length))
        staged = buffers.take({"x": source})
        assert staged is not None
        assert torch.equal(staged.tensors()["x"], source)
        assert buffers.take({"x": source}) is None
        seen.append(staged.tensors()["x"].data_ptr())
        staged.release()
    assert seen[0] == seen[1] != seen[2]
