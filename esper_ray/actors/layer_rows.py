"""A layer's seeds as rows of its log, and back: state, grafting, weights and rollback copies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from esper_ray.errors import BackpressureError, ConfigError
from esper_ray.growth import snapshot
from esper_ray.layers import LayerSeeds
from esper_ray.storage import CheckpointManager, SaveFuture, row_codec
from esper_ray.storage.layer_rows import (
    STATE,
    WEIGHTS,
    Columns,
    LayerSchema,
    Rows,
    Tensors,
    TensorSchema,
)
from esper_ray.storage.staging import Staged, StagingBuffers

GRAFTING: Final = "grafting"
ROLLBACK: Final = "rollback"

_BORN: Final = {"blueprint_id": -1, "parent_state": -1, "checkpoint_id": -1}


def layer_schema(layer: LayerSeeds) -> LayerSchema:
    """What one row of this layer's log holds."""
    weights = {n: (v.dtype, tuple(v.shape[1:])) for n, v in layer.bank.tensors().items()}
    tables = {STATE: snapshot.STATE_SCHEMA, GRAFTING: snapshot.GRAFTING_SCHEMA}
    return LayerSchema(
        {part: {n: s for n, s in t.items() if n != "seed_id"} for part, t in tables.items()},
        {WEIGHTS: weights, ROLLBACK: weights},
        _BORN,
    )


def load_rows(layer: LayerSeeds, rows: Rows) -> None:
    """Take over rows of all seeds of this layer; CorruptError where they are impossible."""
    snapshot.load_state_columns(layer.state, rows.tables[STATE], rows.tables[GRAFTING])
    snapshot.load_rows(layer, rows.tensors[WEIGHTS], rows.tensors[ROLLBACK])


def seed_record(layer: LayerSeeds, seed_id: int) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """`state_data` and `blueprint_state` of one seed for `save_checkpoint`, copied.

    ConfigError, a ValueError, for a seed that the layer has not.
    """
    if not 0 <= seed_id < layer.state.num_seeds:
        raise ConfigError(f"layer {layer.layer_id!r} has seeds 0..{layer.state.num_seeds - 1}")
    buffers = {n: layer.state.host(n)[..., seed_id : seed_id + 1] for n in snapshot.STATE_BUFFERS}
    columns = snapshot.buffer_columns(buffers)
    state_data: dict[str, Any] = {n: v[0] for n, v in columns.items() if n != "seed_id"}
    grafting = snapshot.grafting_columns(layer.state)
    [*mine] = np.flatnonzero(grafting["seed_id"] == seed_id)
    if mine:
        state_data[GRAFTING] = {n: v[mine[0]] for n, v in grafting.items() if n != "seed_id"}
    slot = int(layer.bank.slot_of_seed[seed_id])
    if slot < 0 or columns["blueprint_id"][0] < 0:
        return state_data, None
    return state_data, {n: v[slot].clone() for n, v in layer.bank.tensors().items()}


class LayerStaging:
    """Stages a layer's rows in the training thread, for a manager to encode behind it.

    `first` is the number of the layer's first seed where it is a shard of a larger layer.
    """

    def __init__(self, layer: LayerSeeds, first: int = 0) -> None:
        self.buffers = StagingBuffers()
        self._layer, self._first = layer, first
        self._weights = layer_schema(layer).tensors[WEIGHTS]

    def save(self, manager: CheckpointManager, step: int) -> SaveFuture | None:
        """Stage all rows and queue them; None, counted, if the store is behind. It never waits."""
        staged = self.stage()
        if staged is None:
            return None
        try:
            return manager.save_layer(staged, step, timeout=0)
        except BackpressureError:
            self.buffers.refused += 1
            staged.release()
            return None
        except BaseException:
            staged.release()
            raise

    def stage(self) -> StagedRows | None:
        """A copy of all rows as they are now, None if no buffers are free."""
        state, bank = self._layer.state, self._layer.bank
        held, weights, buffers = _buffers(bank), dict(bank.weights.items()), _buffers(state)
        sources = {name: buffers[name] for name in snapshot.STATE_BUFFERS}
        sources |= {name: held[name] for name in ("slot_of_seed", "parked")}
        names = [name.removeprefix("copy_") for name in held if name.startswith("copy_")]
        for name in names:
            sources[f"{WEIGHTS}/{name}"] = weights[name] if name in weights else held[name]
        copies = {f"{ROLLBACK}/{name}": held[f"copy_{name}"] for name in names}
        staged = self.buffers.take(sources, seldom=copies)
        if staged is None:
            return None
        return StagedRows(staged, state.grafting.arrays(), self._weights, self._first)


class StagedRows:
    """Staged tensors that become rows where they are encoded; called once."""

    def __init__(self, staged: Staged, grafting: Columns, schema: TensorSchema, first: int) -> None:
        self._staged, self._grafting, self._schema, self._first = staged, grafting, schema, first

    def __call__(self) -> Rows:
        """The rows in memory of their own; the buffers are free again."""
        try:
            return self._rows(self._staged.tensors()).renumbered(self._first)
        finally:
            self.release()

    def release(self) -> None:
        """Give the buffers back."""
        self._staged.release()

    def _rows(self, tensors: Mapping[str, Tensor]) -> Rows:
        state = snapshot.buffer_columns({n: tensors[n].numpy() for n in snapshot.STATE_BUFFERS})
        slots = tensors["slot_of_seed"].numpy()
        grown = np.flatnonzero(state["blueprint_id"] >= 0)
        parked = np.flatnonzero((slots >= 0) & tensors["parked"].numpy()[slots])
        kinds = {n: kind for n, (kind, _) in snapshot.GRAFTING_SCHEMA.items()}
        grafting = {n: self._grafting[n].astype(kind) for n, kind in kinds.items()}
        tables = {STATE: _with_events(state), GRAFTING: _with_events(grafting)}
        return Rows(
            tables,
            {
                WEIGHTS: self._tensors(WEIGHTS, tensors, grown, slots),
                ROLLBACK: self._tensors(ROLLBACK, tensors, parked, slots),
            },
        )

    def _tensors(
        self, part: str, tensors: Mapping[str, Tensor], seeds: NDArray[Any], slots: NDArray[Any]
    ) -> Tensors:
        ids = torch.from_numpy(seeds.astype(np.int32))
        if not len(seeds):
            return row_codec.empty_tensors(self._schema)
        wanted = torch.from_numpy(slots[seeds].astype(np.int64))
        names = (f"{part}/{name}" for name in self._schema)
        found = [tensors[name].index_select(0, wanted) for name in names]
        keys = {"seed_id": ids, "event_no": torch.zeros_like(ids)}
        return {**keys, **dict(zip(self._schema, found, strict=True))}


def _buffers(module: nn.Module) -> Tensors:
    """A module's own buffers, for a tenth of what `named_buffers` takes."""
    return {name: value for name, value in module._buffers.items() if value is not None}


def _with_events(table: Columns) -> Columns:
    ids = table["seed_id"]
    rest = {name: value for name, value in table.items() if name != "seed_id"}
    return {"seed_id": ids, "event_no": np.zeros(len(ids), np.int32), **rest}
