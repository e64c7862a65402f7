"""A stage's segments in a run's log, written and read where the stage lives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
from torch import Tensor

from esper_ray.errors import CorruptError
from esper_ray.growth import snapshot, state_versions
from esper_ray.growth.snapshot import Columns
from esper_ray.growth.stage import Stage
from esper_ray.growth.state_versions import StoredLayer
from esper_ray.layers import LayerSeeds
from esper_ray.storage import RunLog, SegmentRef, codec, manifest
from esper_ray.storage.migrations import migrate

Segments = Mapping[str, SegmentRef]


def save_stage(stage: Stage, log: RunLog) -> list[SegmentRef]:
    """Store everything that a resumed run needs of this stage; commits nothing."""
    host = codec.encode_tensors(snapshot.host_tensors(stage))
    refs = [log.put_segment(host_name(stage), host, "safetensors")]
    for trainer in stage.trainers.values():
        refs += save_layer(trainer.layer, log)
    return refs


def host_name(stage: Stage) -> str:
    """Segment name of a stage's host weights."""
    return f"stage{stage.spec.index}/host"


def layer_name(layer_id: str, part: str) -> str:
    """Segment name of a layer's `state`, `grafting`, `weights` or `rollback`."""
    return f"layer/{layer_id}/{part}"


def save_layer(layer: LayerSeeds, log: RunLog) -> list[SegmentRef]:
    """Store state and weights of one layer's seeds; commits nothing."""
    name, rows = layer.layer_id, layer.state.num_seeds
    table = codec.encode_table(snapshot.state_columns(layer.state))
    refs = [log.put_segment(layer_name(name, "state"), table, "arrow", rows)]
    grafting = snapshot.grafting_columns(layer.state)
    data, rows = codec.encode_table(grafting), len(layer.state.grafting)
    refs.append(log.put_segment(layer_name(name, "grafting"), data, "arrow", rows))
    for part, tensors in (
        ("weights", snapshot.grown_tensors(layer)),
        ("rollback", snapshot.rollback_tensors(layer)),
    ):
        data, count = codec.encode_tensors(tensors), len(tensors["seed_id"])
        refs.append(log.put_segment(layer_name(name, part), data, "safetensors", count))
    return refs


def restore_stage(stage: Stage, log: RunLog, segments: Segments, step: int) -> None:
    """Take over what `save_stage` stored; CorruptError where it does not fit this stage."""
    snapshot.load_host(stage, read_host(stage, log, segments))
    for trainer in stage.trainers.values():
        restore_layer(trainer.layer, log, segments)
    snapshot.resume_trainers(stage, step)


def read_host(stage: Stage, log: RunLog, segments: Segments) -> dict[str, Tensor]:
    """A stage's stored host tensors, whatever they are; CorruptError where they are damaged."""
    ref = named(segments, host_name(stage))
    if ref.rows:
        raise CorruptError(f"segment {ref.name!r} has {ref.rows} rows, a host has none")
    return codec.decode_tensors(log.read_segment(ref))


def restore_layer(layer: LayerSeeds, log: RunLog, segments: Segments) -> None:
    """Take over what `save_layer` stored; CorruptError where it does not fit this layer."""
    columns, grafting = read_tables(log, segments, layer.layer_id)
    snapshot.load_state_columns(layer.state, columns, grafting)
    parts = []
    for part in ("weights", "rollback"):
        ref = named(segments, layer_name(layer.layer_id, part))
        expected = snapshot.row_shapes(layer.bank, ref.rows)
        parts.append(codec.decode_tensors(log.read_segment(ref), expected))
    snapshot.load_rows(layer, *parts)


def read_tables(log: RunLog, segments: Segments, layer_id: str) -> tuple[Columns, Columns]:
    """A stored layer's tables of state and of grafting, without building the layer.

    A state of an older version is brought to the present one, seeds in GRAFTING as just entered;
    CorruptError where it is damaged.
    """
    ref = named(segments, layer_name(layer_id, "state"))
    columns, version = decode_state(log.read_segment(ref), ref.rows)
    if version == state_versions.NEWEST:
        ref = named(segments, layer_name(layer_id, "grafting"))
        data = log.read_segment(ref)
        return columns, codec.decode_table(data, snapshot.GRAFTING_SCHEMA, ref.rows)
    return columns, snapshot.entered_grafting(columns)


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
