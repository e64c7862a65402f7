"""Seeds that are rolled back get what their checkpoints hold, all of it or nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from esper_ray.actors import persistence
from esper_ray.actors.layer_rows import layer_schema, seed_record
from esper_ray.actors.rollback import roll_back_layer, roll_back_seeds
from esper_ray.errors import CheckpointNotFound, ConfigError, CorruptError
from esper_ray.growth import snapshot
from esper_ray.growth.stage import Stage
from esper_ray.layers import LayerSeeds
from esper_ray.lifecycle import Cause
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.storage import CheckpointManager, Root, RunLog, ShardId, manifest
from esper_ray.storage.group_commit import CommitPolicy
from tests.builders import metrics, move, run_step, same_bits, stage_spec, transitions, walk

LAYER = "model.0.hidden.0"
HOST = "0.hidden.0."


@dataclass
class Rolled:
    """A stage whose seed 0 was checkpointed, trained on and rolled back; seed 1 was left alone."""

    stage: Stage
    folder: Path
    manager: CheckpointManager
    ids: list[str]
    weights: dict[str, Tensor]
    row: dict[str, object]
    host: dict[str, Tensor]

    @property
    def layer(self) -> LayerSeeds:
        return self.stage.trainers[LAYER].layer

    def reader(self) -> CheckpointManager:
        return CheckpointManager(str(self.folder), layer_id=LAYER)


def epoch(stage: Stage) -> None:
    for _ in range(stage.spec.epoch_steps):
        run_step(stage)
    stage.end_epoch(stage.step // stage.spec.epoch_steps - 1)


def measured(stage: Stage, value: float) -> None:
    told = metrics([0, 1], [[value] * 4] * 2, valid=[15, 15], score=[value, value])
    stage.record(replace(told, layer_id=LAYER))


@pytest.fixture
def rolled(tmp_path: Path) -> Rolled:
    stage = Stage(stage_spec())
    layer = stage.trainers[LAYER].layer
    walk(stage, [0, 1], S.TRAINING)
    epoch(stage)
    measured(stage, 0.25)
    move(stage, [0, 1], S.TRAINING, S.GRAFTING)
    manager = CheckpointManager(
        str(tmp_path),
        layer_id=LAYER,
        schema=layer_schema(layer),
        shard=ShardId.whole(4),
        policy=CommitPolicy(interval_s=0.0),
    )
    ids = [str(manager.save_checkpoint(LAYER, n, *seed_record(layer, n))) for n in (0, 1)]
    manager.flush()
    row, weights = seed_record(layer, 0)
    assert weights is not None
    host = {name: value.clone() for name, value in snapshot.host_tensors(stage).items()}
    log = RunLog(Root.open(str(tmp_path / "run")))
    log.commit(log.open_epoch(None).next_seq, {"step": 2}, persistence.save_stage(stage, log))
    epoch(stage)
    measured(stage, 0.75)
    move(stage, [0], S.GRAFTING, S.ROLLED_BACK)
    # What a transition restores by itself from a copy in the bank is made worthless here.
    for name, value in layer.bank.tensors().items():
        value[0] = 7
        layer.bank.copies()[name][0] = 9
    return Rolled(stage, tmp_path, manager, ids, weights, row, host)


def everything(stage: Stage) -> dict[str, Tensor]:
    told = {**stage.module.state_dict(), **snapshot.host_tensors(stage)}
    return {name: value.clone() for name, value in told.items()}


def changed(stage: Stage, before: dict[str, Tensor]) -> set[str]:
    return {n for n, value in everything(stage).items() if not same_bits(value, before[n])}


def check_seeds(rolled: Rolled, before: dict[str, Tensor]) -> None:
    """Seed 0 is as it was at its checkpoint, but rolled back; seed 1 as it was just now."""
    row, weights = seed_record(rolled.layer, 0)
    assert weights is not None
    assert all(same_bits(value, rolled.weights[name]) for name, value in weights.items())
    for name in ("performance_metrics", "metrics_valid", "evaluation_score", "grafting_strategy"):
        assert np.array_equal(row[name], rolled.row[name]), name  # type: ignore[arg-type]
    assert row["evaluation_score"] == 250
    assert (row["lifecycle_state"], row["parent_state"]) == (S.ROLLED_BACK, S.GRAFTING)
    assert (row["alpha"], row["epochs_in_state"], row["transition_count"]) == (0, 0, 4)
    other, _ = seed_record(rolled.layer, 1)
    assert other["evaluation_score"] == 750
    after = everything(rolled.stage)
    for name in changed(rolled.stage, before):
        if "seeds.bank" in name and before[name].dim() and "copy_" not in name:
            assert same_bits(after[name][1:], before[name][1:])


@pytest.mark.parametrize("place", ["memory", "store"])
def test_a_seed_gets_its_row_weights_and_moments_back(rolled: Rolled, place: str) -> None:
    before = everything(rolled.stage)
    rolled.manager.close()
    if place == "memory":
        shutil.rmtree(rolled.folder / "segments")
        shutil.rmtree(rolled.folder / "layers")
    manager = rolled.manager if place == "memory" else rolled.reader()
    roll_back_seeds(rolled.layer, manager, rolled.ids[:1])
    check_seeds(rolled, before)
    assert not {name for name in changed(rolled.stage, before) if name.startswith("parameter/")}


@pytest.mark.parametrize("place", ["memory", "store"])
def test_a_layer_gets_its_host_module_back_too_and_nothing_else(rolled: Rolled, place: str) -> None:
    before, host = everything(rolled.stage), rolled.host
    rolled.manager.close()
    if place == "store":
        log = RunLog(Root.open(str(rolled.folder / "run")))
        refs = {ref.name: ref for ref in manifest.segments(log.read_commit(1))}
        host = persistence.read_host(rolled.stage.spec, log, refs)
    roll_back_layer(rolled.stage, LAYER, rolled.reader(), rolled.ids[:1], host)
    check_seeds(rolled, before)
    now = snapshot.host_tensors(rolled.stage)
    mine = {name for name in now if HOST in name}
    assert {name.partition("/")[0] for name in mine} == {"parameter", "adam"}
    assert not {name for name in mine if not same_bits(now[name], rolled.host[name])}
    assert {name for name in mine if not same_bits(now[name], before[name])} >= {
        f"parameter/{HOST}weight",
        f"adam/{HOST}weight/exp_avg",
    }
    assert not {n for n in now if n not in mine and not same_bits(now[n], before[n])}


# ---- what cannot be ------------------------------------------------------------------------------


def flip(folder: Path, pattern: str) -> None:
    for path in folder.rglob(pattern):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))


def refused(rolled: Rolled, ids: list[str], error: type[Exception], words: str) -> None:
    """Both scopes raise it and change nothing."""
    before = everything(rolled.stage)
    with pytest.raises(error, match=words):
        roll_back_seeds(rolled.layer, rolled.reader(), ids)
    assert changed(rolled.stage, before) == set()
    with pytest.raises(error, match=words):
        roll_back_layer(rolled.stage, LAYER, rolled.reader(), ids, rolled.host)
    assert changed(rolled.stage, before) == set()


@pytest.mark.parametrize("pattern", ["layers/*/*/*/*2.json", "segments/sha256/*/*"])
def test_a_damaged_checkpoint_is_named_and_changes_nothing(rolled: Rolled, pattern: str) -> None:
    rolled.manager.close()
    flip(rolled.folder, pattern)
    refused(rolled, rolled.ids[:1], CorruptError, "damaged")


def test_one_bad_checkpoint_of_two_changes_neither_seed(rolled: Rolled) -> None:
    move(rolled.stage, [1], S.GRAFTING, S.ROLLED_BACK)
    key, _, rest = rolled.ids[1].partition("-")
    for unknown in (f"{key}-{rest[:-1]}7", f"{'0' * 16}-{rest}", "nothing"):
        refused(rolled, [rolled.ids[0], unknown], CheckpointNotFound, "Checkpoint not found")


def test_seeds_that_are_not_rolled_back_or_come_twice_are_refused(rolled: Rolled) -> None:
    refused(rolled, rolled.ids, ConfigError, "seed 1 .* is in GRAFTING")
    refused(rolled, [rolled.ids[0]] * 2, ConfigError, "comes twice")
    anew = transitions([0], S.ROLLED_BACK, S.DORMANT, layer_id=LAYER, cause=Cause.REPLANT)
    assert anew.replants.all()
    rolled.stage.apply(anew)
    refused(rolled, rolled.ids[:1], ConfigError, "is in DORMANT, generation 1, .* generation 0")


Change = Callable[[dict[str, object], dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row, _: row.update(grafting_strategy=99), "strategy has the number 99"),
        (lambda row, _: row.update(performance_metrics=[np.nan] * 4), "not finite"),
        (lambda row, _: row.update(blueprint_id=-1), "no weights"),
        (lambda _, weights: weights.clear(), "no weights"),
    ],
)
def test_an_impossible_checkpoint_is_corrupt(rolled: Rolled, change: Change, words: str) -> None:
    row, weights = dict(rolled.row), dict(rolled.weights)
    change(row, weights)
    saved = rolled.manager.save_checkpoint(LAYER, 0, row, weights or None)
    rolled.manager.close()
    refused(rolled, [saved], CorruptError, words)


def test_a_checkpoint_of_other_columns_or_weights_is_corrupt(rolled: Rolled) -> None:
    whole = layer_schema(rolled.layer)
    shapes = {name: (kind, (*shape, 2)) for name, (kind, shape) in whole.tensors["weights"].items()}
    columns = {n: s for n, s in whole.tables["state"].items() if n != "alpha"}
    for number, (schema, drop, words) in enumerate(
        (
            (replace(whole, tensors={**whole.tensors, "weights": shapes}), "", "blueprint"),
            (replace(whole, tables={**whole.tables, "state": columns}), "alpha", "columns"),
        )
    ):
        with CheckpointManager(
            str(rolled.folder),
            layer_id=LAYER,
            schema=schema,
            shard=ShardId.whole(4),
            run_epoch=number + 2,
        ) as manager:
            row = {name: value for name, value in rolled.row.items() if name != drop}
            grown = {
                name: torch.stack([value] * 2, -1) if not drop else value
                for name, value in rolled.weights.items()
            }
            saved = manager.save_checkpoint(LAYER, 0, row, grown)
        refused(rolled, [saved], CorruptError, words)


@pytest.mark.parametrize("name", [f"parameter/{HOST}weight", f"adam/{HOST}weight/exp_avg"])
def test_a_host_of_another_shape_is_corrupt_and_changes_nothing(rolled: Rolled, name: str) -> None:
    before = everything(rolled.stage)
    rolled.host[name] = torch.ones(3)
    with pytest.raises(CorruptError, match="in storage"):
        roll_back_layer(rolled.stage, LAYER, rolled.reader(), rolled.ids[:1], rolled.host)
    assert changed(rolled.stage, before) == set()
