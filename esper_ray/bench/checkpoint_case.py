"""The layer whose checkpoints are measured, and the step that runs beside them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from esper_ray.actors.layer_rows import layer_schema
from esper_ray.events.messages import TransitionBatch
from esper_ray.layers import ChunkedKasminaLayer, LayerSeeds
from esper_ray.lifecycle import ExtendedLifecycle
from esper_ray.storage import CheckpointManager, Root, ShardId

_S = ExtendedLifecycle
_ROAD = (_S.DORMANT, _S.GERMINATED, _S.TRAINING, _S.GRAFTING, _S.STABILIZATION)


@dataclass(frozen=True, slots=True)
class CheckpointCase:
    """A layer of `seeds` seeds of which `active` hold weights; 94 and as many moments twice.

    `stagings` are timed in a window; `repeats` are interleaved, the best counts.
    """

    seeds: int = 10_000
    active: int = 1_000
    stagings: int = 2_000
    repeats: int = 5
    restores: int = 300

    def build(self) -> ChunkedKasminaLayer:
        """The layer; a tenth of its active seeds are in GRAFTING, the others beyond."""
        torch.manual_seed(0)
        layer = ChunkedKasminaLayer(nn.Linear(64, self.seeds * 4), self.seeds, hidden=10)
        ids = torch.randperm(self.seeds)[: self.active].sort().values.numpy()
        grafting = ids[:: max(1, len(ids) // max(1, self.active // 10))]
        for source, target in itertools.pairwise(_ROAD):
            moved = ids if target is not _S.STABILIZATION else np.setdiff1d(ids, grafting)
            _move(layer, moved, source, target)
        with torch.no_grad():
            for weight in layer.bank.weights.values():
                weight.normal_(0.0, 0.1)
        return layer


def manager_of(layer: LayerSeeds, root: Root) -> CheckpointManager:
    """The one writer of a layer at a root."""
    return CheckpointManager(
        root,
        layer_id=layer.layer_id,
        schema=layer_schema(layer),
        shard=ShardId.whole(layer.state.num_seeds),
    )


def _move(layer: ChunkedKasminaLayer, ids: NDArray[Any], source: _S, target: _S) -> None:
    def column(value: int, kind: type[np.generic]) -> NDArray[Any]:
        return np.full(len(ids), value, kind)

    born = 0 if target is _S.GERMINATED else -1
    layer.apply_transitions(
        TransitionBatch(
            layer_id=layer.layer_id,
            number=1,
            epoch=0,
            seed_ids=ids.astype(np.int64),
            expected_state=column(source, np.int32),
            expected_generation=column(0, np.int16),
            target=column(target, np.int32),
            cause=column(0, np.int32),
            blueprint_id=column(born, np.int32),
            strategy=column(born, np.int32),
            checkpoint_id=column(-1, np.int32),
        )
    )


def busy_step(layer: ChunkedKasminaLayer) -> Callable[[], None]:
    """A small training step: forward with the seeds blended in, and backward."""
    x = torch.randn(4, 64)

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        layer(x).square().mean().backward()

    return step
