"""A stage's segments in a run's log, written and read where the stage lives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
from torch import Tensor

from esper_ray.errors import CorruptError
from esper_ray.growth import shard_rows, snapshot, state_versions
from esper_ray.growth.shard import WHOLE, Shard
from esper_ray.growth.snapshot import Columns
from esper_ray.growth.spec import StageSpec
from esper_ray.growth.stage import Stage
from esper_ray.growth.state_versions import StoredLayer
from esper_ray.layers import LayerSeeds
from esper_ray.storage import RunLog, SegmentRef, codec, manifest
from esper_ray.storage.migrations import migrate

Segments = Mapping[str, SegmentRef]


def save_stage(stage: Stage, log: RunLog) -> list[SegmentRef]:
    """Store everything that a resumed run needs of this stage; commits nothing.

    A shard stores its own rows, and the first one also what all of them hold.
    """
    shard = stage.spec.shard
    own, common = shard_rows.split_tensors(stage.spec, snapshot.host_tensors(stage))
    name = host_name(stage.spec.index)
    refs: list[SegmentRef] = []
    if shard.index == 0:
        whole = {**own, **common} if shard.count == 1 else common
        refs.append(log.put_segment(name, codec.encode_tensors(whole), "safetensors"))
    if shard.count > 1 and own:
        part = part_name(name, shard.index)
        refs.append(log.put_segment(part, codec.encode_tensors(own), "safetensors"))
    for trainer in stage.trainers.values():
        refs += save_layer(trainer.layer, log, shard)
    return refs


def host_name(stage: int) -> str:
    """Segment name of a stage's host weights."""
    return f"stage{stage}/host"


def layer_name(layer_id: str, part: str) -> str:
    """Segment name of a layer's `state`, `grafting`, `weights` or `rollback`."""
    return f"layer/{layer_id}/{part}"


def part_name(name: str, number: int) -> str:
    """Segment name of a shard's part of something."""
    return f"{name}/part{number:04d}"


def parts_of(segments: Segments, name: str) -> list[SegmentRef]:
    """The segments that something is stored in: one, or the parts of its shards in order.

    CorruptError if the checkpoint has none.
    """
    found: list[SegmentRef] = []
    while part_name(name, len(found)) in segments:
        found.append(segments[part_name(name, len(found))])
    return found or [named(segments, name)]


def save_layer(layer: LayerSeeds, log: RunLog, shard: Shard = WHOLE) -> list[SegmentRef]:
    """Store state and weights of one layer's seeds; commits nothing."""

    def put(part: str, data: bytes, suffix: str, rows: int) -> SegmentRef:
        name = layer_name(layer.layer_id, part)
        where = name if shard.count == 1 else part_name(name, shard.index)
        return log.put_segment(where, data, suffix, rows)

    first = layer.first_seed
    state = shard_rows.renumbered(snapshot.state_columns(layer.state), first)
    grafting = shard_rows.renumbered(snapshot.grafting_columns(layer.state), first)
    return [
        put("state", codec.encode_table(state), "arrow", layer.state.num_seeds),
        put("grafting", codec.encode_table(grafting), "arrow", len(layer.state.grafting)),
        *(
            put(part, codec.encode_tensors(tensors), "safetensors", len(tensors["seed_id"]))
            for part, tensors in (
                ("weights", shard_rows.renumbered(snapshot.grown_tensors(layer), first)),
                ("rollback", shard_rows.renumbered(snapshot.rollback_tensors(layer), first)),
            )
        ),
    ]


def restore_stage(stage: Stage, log: RunLog, segments: Segments, step: int) -> None:
    """Take over what `save_stage` stored, on however many shards that was; CorruptError where it
    does not fit this stage."""
    snapshot.load_host(
        stage, shard_rows.rows_of_shard(stage.spec, read_host(stage.spec, log, segments))
    )
    for trainer in stage.trainers.values():
        restore_layer(trainer.layer, log, segments)
    snapshot.resume_trainers(stage, step)


def read_host(spec: StageSpec, log: RunLog, segments: Segments) -> dict[str, Tensor]:
    """A stage's stored host tensors, whatever they are; CorruptError where they are damaged."""
    name = host_name(spec.index)
    tensors = _read_host(log, named(segments, name))
    if part_name(name, 0) not in segments:
        return tensors
    parts = [_read_host(log, ref) for ref in parts_of(segments, name)]
    return tensors | shard_rows.joined_tensors(parts)


def _read_host(log: RunLog, ref: SegmentRef) -> dict[str, Tensor]:
    if ref.rows:
        raise CorruptError(f"segment {ref.name!r} has {ref.rows} rows, a host has none")
    return codec.decode_tensors(log.read_segment(ref))


def restore_layer(layer: LayerSeeds, log: RunLog, segments: Segments) -> None:
    """Take over what `save_layer` stored; CorruptError where it does not fit this layer."""
    columns, grafting = (
        shard_rows.rows_between(table, layer.first_seed, layer.state.num_seeds)
        for table in read_tables(log, segments, layer.layer_id)
    )
    snapshot.load_state_columns(layer.state, columns, grafting)
    parts = []
    for part in ("weights", "rollback"):
        stored = []
        for ref in parts_of(segments, layer_name(layer.layer_id, part)):
            expected = snapshot.row_shapes(layer.bank, ref.rows)
            stored.append(codec.decode_tensors(log.read_segment(ref), expected))
        rows = shard_rows.joined_tensors(stored)
        parts.append(shard_rows.rows_between(rows, layer.first_seed, layer.state.num_seeds))
    snapshot.load_rows(layer, *parts)


def read_tables(log: RunLog, segments: Segments, layer_id: str) -> tuple[Columns, Columns]:
    """A stored layer's tables of state and of grafting, without building the layer.

    A state of an older version is brought to the present one, seeds in GRAFTING as just entered;
    CorruptError where it is damaged.
    """
    stored = parts_of(segments, layer_name(layer_id, "state"))
    read = [decode_state(log.read_segment(ref), ref.rows) for ref in stored]
    columns = shard_rows.joined_columns([columns for columns, _ in read])
    if any(version != state_versions.NEWEST for _, version in read):
        return columns, snapshot.entered_grafting(columns)
    grafting = [
        codec.decode_table(log.read_segment(ref), snapshot.GRAFTING_SCHEMA, ref.rows)
        for ref in parts_of(segments, layer_name(layer_id, "grafting"))
    ]
    return columns, shard_rows.joined_columns(grafting)


def layer_ids(segments: Segments) -> list[str]:
    """The layers whose states a checkpoint holds, in its order."""
    found: dict[str, None] = {}
    for name in segments:
        layer_id, state, part = name.removeprefix("layer/").rpartition("/state")
        if name.startswith("layer/") and state and (not part or part.startswith("/part")):
            found[layer_id] = None
    return list(found)


def read_state(log: RunLog, segments: Segments, layer_id: str) -> Columns:
    """The state table alone."""
    return read_tables(log, segments, layer_id)[0]


def decode_state(data: bytes, rows: int) -> tuple[Columns, int]:
    """The present columns of a state table of any version, and that version."""
    names = codec.column_names(data)
    found = (v for v, schema in state_versions.SCHEMAS.items() if list(schema) == names)
    version = next(found, state_versions.NEWEST)
    table = codec.decode_table(data, state_versions.SCHEMAS[version], rows)
    stored = migrate(StoredLayer(table), version, state_versions.NEWEST, state_versions.STEPS)
    return stored.table, version


def read_checked_state(log: RunLog, segments: Segments, layer_id: str) -> Columns:
    """A stored layer's state table, with CorruptError for one that a resume would refuse."""
    columns, grafting = read_tables(log, segments, layer_id)
    snapshot.check_state_columns(columns, grafting, len(columns["seed_id"]))
    return columns


LOSS_SCHEMA: Final = {"step": (np.dtype(np.int64), 0), "loss": (np.dtype(np.float64), 0)}
"""Columns of a commit's `metrics`: the task loss in nats of each step since the commit before."""


def read_losses(log: RunLog) -> dict[int, float]:
    """Task loss by step over the current history of a run; rewound steps are not in it."""
    losses: dict[int, float] = {}
    for seq in reversed(log.lineage()):
        stored = {ref.name: ref for ref in manifest.segments(log.read_commit(seq))}
        ref = named(stored, "metrics")
        table = codec.decode_table(log.read_segment(ref), LOSS_SCHEMA, ref.rows)
        losses.update(zip(table["step"].tolist(), table["loss"].tolist(), strict=True))
    return losses


def named(segments: Segments, name: str) -> SegmentRef:
    """The segment of that name; CorruptError if the checkpoint has none."""
    if name not in segments:
        raise CorruptError(f"the checkpoint holds no segment {name!r}")
    return segments[name]
