"""A stage taken apart and put together again is the same stage, to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from esper_ray.errors import CorruptError
from esper_ray.growth import snapshot
from esper_ray.growth.spec import StageSpec
from esper_ray.growth.stage import Stage
from esper_ray.layers import LayerSeeds
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.seeds import ExtendedStateTensor, bank
from tests.builders import metrics, move, run_step, same_bits, stage_spec, walk

Damage = Callable[[snapshot.Columns], object]


def layer_of(stage: Stage) -> LayerSeeds:
    [trainer] = stage.trainers.values()
    return trainer.layer


def lived(spec: StageSpec) -> Stage:
    """Two epochs in which every seed went its own way."""
    stage = Stage(spec)
    last = layer_of(stage).state.num_seeds - 1
    walk(stage, [0, 1, last], S.TRAINING)
    epoch(stage)
    move(stage, [0, 1], S.TRAINING, S.GRAFTING)
    epoch(stage)
    move(stage, [1], S.GRAFTING, S.STABILIZATION)
    stage.record(
        replace(metrics([0], [[1, 2, 3, 4]], valid=[7], score=[0.5]), layer_id="model.0.hidden.0")
    )
    return stage


def epoch(stage: Stage) -> None:
    for _ in range(stage.spec.epoch_steps):
        run_step(stage)
    stage.end_epoch(stage.step // stage.spec.epoch_steps - 1)


def copy_of(stage: Stage) -> Stage:
    """A new stage that has taken over what was stored of `stage`."""
    again, layer = Stage(stage.spec), layer_of(stage)
    stored = copy.deepcopy(
        (
            snapshot.host_tensors(stage),
            snapshot.state_columns(layer.state),
            snapshot.grafting_columns(layer.state),
            snapshot.grown_tensors(layer),
            snapshot.rollback_tensors(layer),
        )
    )
    snapshot.load_host(again, stored[0])
    snapshot.load_state_columns(layer_of(again).state, stored[1], stored[2])
    snapshot.load_rows(layer_of(again), stored[3], stored[4])
    snapshot.resume_trainers(again, stage.step)
    return again


def everything(stage: Stage) -> dict[str, torch.Tensor]:
    return {**stage.module.state_dict(), **snapshot.host_tensors(stage)}


def differing(one: Stage, other: Stage) -> list[str]:
    a, b = everything(one), everything(other)
    assert a.keys() == b.keys()
    return [name for name in a if not same_bits(a[name], b[name])]


def test_lesson_40_a_stored_stage_comes_back_with_every_bit(spec: StageSpec) -> None:
    stage = lived(spec)
    assert differing(stage, copy_of(stage)) == []


def test_lesson_40_a_stored_stage_goes_on_bit_for_bit(spec: StageSpec) -> None:
    stage = lived(spec)
    again = copy_of(stage)
    for _ in range(3):
        for _ in range(spec.epoch_steps):
            assert all(map(same_bits, run_step(stage), run_step(again)))
        one, other = stage.end_epoch(stage.step), again.end_epoch(again.step)
        assert one.losses == other.losses
        for name in snapshot.STATE_SCHEMA:
            assert np.array_equal(
                snapshot.state_columns(layer_of(stage).state)[name],
                snapshot.state_columns(layer_of(again).state)[name],
            )
        for name in ("seed_ids", "weight_drift", "gradient_norm"):
            a, b = (getattr(each.telemetry[0].signals, name) for each in (one, other))
            np.testing.assert_array_equal(a, b)
    assert differing(stage, again) == []


def test_seeds_that_share_few_slots_live_the_same_to_the_last_bit(
    spec: StageSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy = lived(spec)
    monkeypatch.setattr(bank, "FIRST_SLOTS", 1)
    tight = lived(spec)
    for _ in range(2):
        one, other = (snapshot.grown_tensors(layer_of(each)) for each in (roomy, tight))
        assert len(one["seed_id"]) == 3
        assert all(map(same_bits, one.values(), other.values()))
        one, other = (snapshot.rollback_tensors(layer_of(each)) for each in (roomy, tight))
        assert one["seed_id"].tolist() == [0, 1]
        assert all(map(same_bits, one.values(), other.values()))
        assert same_bits(
            layer_of(roomy).state.get_buffer("columns"), layer_of(tight).state.get_buffer("columns")
        )
        again = copy_of(tight)
        for each in (roomy, tight, again):
            epoch(each)
        assert same_grown(tight, again)


def same_grown(one: Stage, other: Stage) -> bool:
    a, b = (snapshot.grown_tensors(layer_of(each)) for each in (one, other))
    return all(map(same_bits, a.values(), b.values()))


def test_lesson_22_a_resumed_stage_can_still_roll_back(spec: StageSpec) -> None:
    stage = lived(spec)
    again = copy_of(stage)
    for one in (stage, again):
        epoch(one)
        move(one, [0], S.GRAFTING, S.ROLLED_BACK)
    assert differing(stage, again) == []


def test_lesson_37_a_state_table_holds_the_full_row() -> None:
    stage = lived(stage_spec())
    columns = snapshot.state_columns(layer_of(stage).state)
    assert {n: (c.dtype, c.shape[1] if c.ndim > 1 else 0) for n, c in columns.items()} == dict(
        snapshot.STATE_SCHEMA
    )
    assert columns["lifecycle_state"].tolist() == [S.GRAFTING, S.STABILIZATION, 0, S.TRAINING]
    assert columns["epochs_in_state"].tolist() == [1, 0, 2, 2]
    assert columns["evaluation_score"].tolist() == [500, 0, 0, 0]
    assert columns["transition_count"].tolist() == [3, 4, 0, 2]


def test_lesson_38_stored_columns_do_not_follow_the_live_ones() -> None:
    state = ExtendedStateTensor(2)
    columns = snapshot.state_columns(state)
    walk(state, [0], S.STABILIZATION)
    assert columns["lifecycle_state"].tolist() == [0, 0]
    assert columns["alpha"].tolist() == [0, 0]
    assert not columns["transition_history"].any()


def stored(state: ExtendedStateTensor) -> tuple[snapshot.Columns, snapshot.Columns]:
    return snapshot.state_columns(state), snapshot.grafting_columns(state)


def put(name: str, row: int, value: float) -> Damage:
    def damage(columns: snapshot.Columns) -> None:
        columns[name][row] = value

    return damage


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (put("lifecycle_state", 0, 11), "lifecycle state"),
        (put("lifecycle_state", 1, -1), "lifecycle state"),
        (put("alpha", 0, 1.5), "alpha"),
        (put("alpha", 0, -0.1), "alpha"),
        (put("alpha", 1, np.nan), "alpha"),
        (put("alpha", 1, np.inf), "alpha"),
        (put("seed_id", 1, 0), "seed ids"),
        (put("epochs_in_state", 1, -5), "negative"),
        (put("generation", 1, -1), "negative"),
    ],
)
def test_lesson_33_impossible_columns_are_corrupt_and_change_nothing(
    damage: Damage, named: str
) -> None:
    state = ExtendedStateTensor(2)
    walk(state, [1], S.GRAFTING)
    before = copy.deepcopy(state.state_dict())
    columns, grafting = stored(ExtendedStateTensor(2))
    damage(columns)
    with pytest.raises(CorruptError, match=f"stored seed state is impossible.*{named}"):
        snapshot.load_state_columns(state, columns, grafting)
    assert all(same_bits(before[name], value) for name, value in state.state_dict().items())


def test_columns_of_fewer_seeds_are_corrupt() -> None:
    with pytest.raises(CorruptError, match=r"seed ids are not 0\.\.3"):
        snapshot.load_state_columns(ExtendedStateTensor(4), *stored(ExtendedStateTensor(3)))


def test_memory_of_grafting_must_be_that_of_the_seeds_in_grafting() -> None:
    state = ExtendedStateTensor(3)
    walk(state, [1], S.GRAFTING)
    columns, grafting = stored(state)
    none = {name: values[:0] for name, values in grafting.items()}
    with pytest.raises(CorruptError, match="not that of the seeds in GRAFTING"):
        snapshot.load_state_columns(ExtendedStateTensor(3), columns, none)
    snapshot.load_state_columns(ExtendedStateTensor(3), columns, grafting)


@pytest.mark.parametrize("ids", [[0, 0], [0, 4], [-1, 0]])
def test_stored_rows_of_unknown_or_repeated_seeds_are_corrupt(ids: list[int]) -> None:
    layer = layer_of(lived(stage_spec()))
    grown = snapshot.grown_tensors(layer)
    rows = {name: value[:2].clone() for name, value in grown.items()}
    rows["seed_id"] = torch.tensor(ids, dtype=torch.int32)
    with pytest.raises(CorruptError, match="seed ids repeat or are out of range"):
        snapshot.load_rows(layer, rows, snapshot.rollback_tensors(layer))


def test_weights_must_be_those_of_the_seeds_that_hold_a_blueprint() -> None:
    layer = layer_of(lived(stage_spec()))
    grown, copies = snapshot.grown_tensors(layer), snapshot.rollback_tensors(layer)
    before = copy.deepcopy(layer.state_dict())
    for rows in (grown, copies):
        rows["seed_id"] = rows["seed_id"].clone()
    fewer = {name: value[:2] for name, value in grown.items()}
    with pytest.raises(CorruptError, match="weights are not those of the seeds"):
        snapshot.load_rows(layer, fewer, copies)
    copies["seed_id"][1] = 2
    with pytest.raises(CorruptError, match="copy is that of a seed without a blueprint"):
        snapshot.load_rows(layer, grown, copies)
    assert all(same_bits(before[name], value) for name, value in layer.state_dict().items())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("parameter/1.logits.bias"), r"differ.*parameter/1\.logits\.bias"),
        (lambda t: t.update({"parameter/more": torch.ones(1)}), "differ.*parameter/more"),
        (lambda t: t.update({"parameter/1.logits.bias": torch.ones(3)}), r"is \(3,\) in storage"),
        (
            lambda t: t.update({"parameter/1.logits.bias": torch.ones(256).double()}),
            "1.logits.bias",
        ),
        (lambda t: t.update({"adam/1.nothing/step": torch.ones(())}), "belongs to no parameter"),
        (lambda t: t.update({"adam/1.logits.bias/exp_avg": torch.ones(3)}), r"exp_avg is \(3,\)"),
    ],
)
def test_host_tensors_of_another_model_are_corrupt(
    change: Callable[[snapshot.Tensors], object], named: str
) -> None:
    stage = lived(stage_spec())
    tensors = snapshot.host_tensors(stage)
    change(tensors)
    fresh = Stage(stage.spec)
    before = everything(fresh)
    kept = {name: value.clone() for name, value in before.items()}
    with pytest.raises(CorruptError, match=named):
        snapshot.load_host(fresh, tensors)
    assert all(same_bits(kept[name], value) for name, value in before.items())


def test_row_shapes_describe_what_is_stored() -> None:
    layer = layer_of(lived(stage_spec()))
    grown, parked = snapshot.grown_tensors(layer), snapshot.rollback_tensors(layer)
    assert grown["seed_id"].tolist() == [0, 1, 3]
    assert parked["seed_id"].tolist() == [0, 1]
    for stored, rows in ((grown, 3), (parked, 2)):
        shapes = snapshot.row_shapes(layer.bank, rows)
        assert {n: (t.dtype, tuple(t.shape)) for n, t in stored.items()} == shapes
