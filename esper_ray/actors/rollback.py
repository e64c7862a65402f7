"""What seeds that have entered ROLLED_BACK get back from their checkpoints.

Scope `seed` is `roll_back_seeds`: rows, weights and optimiser moments of some seeds. Scope `layer`
is `roll_back_layer`: also weights and moments of the module that the seeds sit on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from esper_ray.actors.layer_rows import GRAFTING
from esper_ray.errors import ConfigError, CorruptError
from esper_ray.grafting import unknown_strategies
from esper_ray.growth import snapshot
from esper_ray.growth.stage import Stage
from esper_ray.layers import LayerSeeds
from esper_ray.seeds import SeedBank
from esper_ray.storage import CheckpointManager

Record = Mapping[str, Any]

_OLDER: Final = (
    "blueprint_id",
    "grafting_strategy",
    "evaluation_score",
    "performance_metrics",
    "metrics_valid",
)
"""Columns that go back; the others tell of the transition, or of the seed's whole life."""


def roll_back_seeds(
    layer: LayerSeeds, manager: CheckpointManager, checkpoint_ids: Sequence[str]
) -> None:
    """Give seeds in ROLLED_BACK the strategy, metrics, weights and moments of their checkpoints.

    Their alpha stays 0; state, error count, history and generation stay as the transition left
    them. The manager that saved the checkpoints has those of late in memory. All is read and
    checked before anything changes: CheckpointNotFound for an id that nobody saved, CorruptError
    for a damaged checkpoint or one of another layer, ConfigError for a seed that is not in
    ROLLED_BACK, has been replanted since, or comes twice.
    """
    _give_back(layer, _read(layer, manager, checkpoint_ids))


def roll_back_layer(
    stage: Stage,
    layer_id: str,
    manager: CheckpointManager,
    checkpoint_ids: Sequence[str],
    host: Mapping[str, Tensor],
) -> None:
    """The same for a layer of a stage, whose host module goes back to `host` too.

    `host` is what `snapshot.host_tensors` gave at the checkpoint, kept in memory or read by
    `persistence.read_host`; what belongs to other modules is left alone. CorruptError, and no
    change, where it does not fit.
    """
    layer = stage.trainers[layer_id].layer
    [path] = [spec.path for spec in stage.spec.layers if spec.layer_id == layer_id]
    records = _read(layer, manager, checkpoint_ids)
    snapshot.check_host(stage, dict(host), path)
    _give_back(layer, records)
    snapshot.load_host(stage, dict(host), path)


def _read(
    layer: LayerSeeds, manager: CheckpointManager, checkpoint_ids: Sequence[str]
) -> list[Record]:
    records: list[Record] = [manager.restore_checkpoint(i, "cpu") for i in checkpoint_ids]
    ids = [int(record["seed_id"]) for record in records]
    if len(set(ids)) < len(ids):
        raise ConfigError(f"a seed comes twice in {sorted(ids)}", "name one checkpoint for each")
    for record in records:
        if problem := _impossible(record, layer):
            raise CorruptError(f"checkpoint {record['checkpoint_id']} cannot be used: {problem}")
    return records


def _impossible(record: Record, layer: LayerSeeds) -> str | None:
    state, seed_id = record["state_data"], record["seed_id"]
    if seed_id >= layer.state.num_seeds:
        return f"layer {layer.layer_id!r} has no seed {seed_id}"
    if state.keys() - {GRAFTING} != snapshot.STATE_SCHEMA.keys() - {"seed_id"}:
        return "it has other columns than this layer"
    if record["blueprint_state"] is None or state["blueprint_id"] < 0:
        return "it holds no weights"
    found = {n: (v.dtype, v.shape) for n, v in record["blueprint_state"].items()}
    if found != {n: (v.dtype, v.shape[1:]) for n, v in layer.bank.tensors().items()}:
        return "its weights are not those of this layer's blueprint"
    if unknown_strategies(np.array([state["grafting_strategy"]], np.int32))[0]:
        return f"no grafting strategy has the number {state['grafting_strategy']}"
    if not np.isfinite(state["performance_metrics"]).all():
        return "its metrics are not finite"
    return None


def _give_back(layer: LayerSeeds, records: Sequence[Record]) -> None:
    if not records:
        return

    def column(name: str) -> Any:
        kind, _ = snapshot.STATE_SCHEMA[name]
        return np.array([record["state_data"][name] for record in records], kind)

    layer.give_back(
        np.array([record["seed_id"] for record in records], np.int64),
        column("generation"),
        {name: column(name) for name in _OLDER},
        _stacked(layer.bank, records),
    )


def _stacked(bank: SeedBank, records: Sequence[Record]) -> dict[str, Tensor]:
    tensors = [record["blueprint_state"] for record in records]
    return {name: torch.stack([each[name] for each in tensors]) for name in bank.tensors()}
