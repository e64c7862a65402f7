"""Small valid objects for tests; each takes only what the test is about."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper_ray import data
from esper_ray.events import GraftingSignals, MetricsBatch, TelemetryBatch, TransitionBatch
from esper_ray.growth.spec import DataSpec, LayerSpec, SeedSpec, StageSpec
from esper_ray.growth.stage import Stage
from esper_ray.layers import LayerSeeds
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.seeds import ExtendedStateTensor

ROAD = (
    S.DORMANT,
    S.GERMINATED,
    S.TRAINING,
    S.GRAFTING,
    S.STABILIZATION,
    S.EVALUATING,
    S.FINE_TUNING,
    S.FOSSILIZED,
)
PATHS: dict[S, tuple[S, ...]] = {
    **{state: ROAD[: i + 1] for i, state in enumerate(ROAD)},
    S.CULLED: (*ROAD[:3], S.CULLED),
    S.CANCELLED: (*ROAD[:2], S.CANCELLED),
    S.ROLLED_BACK: (*ROAD[:4], S.ROLLED_BACK),
}
"""One way from DORMANT to every state, both ends included."""


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit, NaN and signed zero included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    a, b = (x.detach().contiguous().flatten().view(torch.uint8) for x in (one, other))
    return torch.equal(a, b)


def transitions(
    seed_ids: Sequence[int],
    source: S | Sequence[int],
    target: S | Sequence[int],
    *,
    layer_id: str = "layer",
    generation: int | Sequence[int] = 0,
    cause: int | Sequence[int] = 0,
    blueprint_id: int | Sequence[int] = -1,
    strategy: int | Sequence[int] = -1,
    checkpoint_id: int | Sequence[int] = -1,
    epoch: int = 0,
    number: int = 1,
) -> TransitionBatch:
    def column(value: int | Sequence[int], kind: type[np.generic]) -> NDArray[Any]:
        return np.broadcast_to(np.asarray(value, dtype=kind), len(seed_ids)).copy()

    return TransitionBatch(
        layer_id=layer_id,
        number=number,
        epoch=epoch,
        seed_ids=np.array(seed_ids, dtype=np.int64),
        expected_state=column(source, np.int32),
        expected_generation=column(generation, np.int16),
        target=column(target, np.int32),
        cause=column(cause, np.int32),
        blueprint_id=column(blueprint_id, np.int32),
        strategy=column(strategy, np.int32),
        checkpoint_id=column(checkpoint_id, np.int32),
    )


def walk(holder: ExtendedStateTensor | LayerSeeds | Stage, ids: list[int], to: S) -> None:
    """Lead DORMANT seeds to `to` through legal moves; a stage must have one layer."""
    for source, target in pairwise(PATHS[to]):
        move(holder, ids, source, target)


def move(
    holder: ExtendedStateTensor | LayerSeeds | Stage, ids: list[int], source: S, target: S
) -> None:
    """Apply one legal move to seeds `ids` and insist that it was made."""
    born = target is S.GERMINATED
    layer_id = next(iter(holder.trainers)) if isinstance(holder, Stage) else "layer"
    batch = transitions(
        ids,
        source,
        target,
        layer_id=layer_id,
        blueprint_id=0 if born else -1,
        strategy=0 if born else -1,
    )
    if isinstance(holder, Stage):
        applied = holder.apply(batch).applied
    elif isinstance(holder, LayerSeeds):
        applied, _ = holder.apply_transitions(batch)
    else:
        applied, _ = holder.compare_and_set(batch)
    assert applied.all()


def metrics(
    seed_ids: Sequence[int],
    values: Sequence[Sequence[float]] | None = None,
    *,
    valid: Sequence[int] | None = None,
    score: Sequence[float] | None = None,
) -> MetricsBatch:
    rows = len(seed_ids)
    return MetricsBatch(
        layer_id="layer",
        seed_ids=np.array(seed_ids, dtype=np.int64),
        metrics=np.array(values if values is not None else np.zeros((rows, 4)), dtype=np.float32),
        valid=np.array(valid if valid is not None else [0] * rows, dtype=np.uint8),
        score=np.array(score if score is not None else [np.nan] * rows, dtype=np.float32),
    )


def signals(seed_ids: Sequence[int], **given: float | Sequence[float]) -> GraftingSignals:
    """What strategies read of some seeds; NaN where nothing is given."""
    rows = len(seed_ids)
    names = list(GraftingSignals.__dataclass_fields__)[1:]
    values = {
        name: np.broadcast_to(np.asarray(given.get(name, np.nan), np.float64), rows).copy()
        for name in names
    }
    return GraftingSignals(np.array(seed_ids, dtype=np.int64), **values)


def telemetry(states: Sequence[S], epochs: int | Sequence[int] = 0, **given: Any) -> TelemetryBatch:
    """What a layer whose seeds are in `states` would report; blended seeds have alpha 1."""
    count = len(states)
    nan = np.full(count, np.nan, dtype=np.float32)
    values: dict[str, Any] = {
        "layer_id": "layer",
        "epoch": 0,
        "state": np.array(states, dtype=np.int32),
        "epochs_in_state": np.broadcast_to(np.asarray(epochs, dtype=np.int32), count).copy(),
        "generation": np.zeros(count, dtype=np.int16),
        "alpha": np.array([4 <= state <= 7 for state in states], dtype=np.float32),
        "error_count": np.zeros(count, dtype=np.int32),
        "local_loss": nan,
        "delta_ratio": nan,
        "chunk_mean": nan,
        "chunk_variance": nan,
        "chunk_gradient": nan,
        "strategy": np.zeros(count, dtype=np.int32),
        "checkpoint_id": np.full(count, -1, dtype=np.int32),
        "last_change": np.full(count, -1, dtype=np.int32),
        "errors": np.zeros(count, dtype=np.int32),
        "signals": signals([i for i, state in enumerate(states) if state == S.GRAFTING]),
        "parameter_share": 0.25,
    }
    return TelemetryBatch(**{**values, **given})


def data_spec(**given: Any) -> DataSpec:
    args = {"window": 4, "cap_bytes": 60_000}
    values: dict[str, Any] = {
        "name": "stdlib_text",
        "args": args,
        "batch_size": 8,
        "micro_batches": 2,
        "evaluation_samples": 16,
        "sha256": data.load("stdlib_text", **args).card.sha256,
    }
    return DataSpec(**{**values, **given})


def stage_spec(**given: Any) -> StageSpec:
    """A whole small byte model in one stage; four seeds on its first hidden layer."""
    values: dict[str, Any] = {
        "index": 0,
        "count": 1,
        "name": "model",
        "factory": "tests.models_for_tests:one_stage",
        "factory_args": {"hidden": 8},
        "run_seed": 3,
        "host_lr": 1e-2,
        "epoch_steps": 2,
        "threads": 1,
        "layers": (LayerSpec("model.0.hidden.0", "0.hidden.0", 8, 4),),
        "seeds": SeedSpec(hidden=4),
        "data": data_spec(),
    }
    return StageSpec(**{**values, **given})


def run_step(stage: Stage) -> list[Tensor]:
    """One optimiser step of a stage that is the whole model; the losses of its micro-batches."""
    stage.begin_step(stage.step)
    losses = []
    for number in range(stage.spec.data.micro_batches):
        losses.append(stage.forward(number, None))
        stage.backward(number, None)
    stage.finish_step()
    return losses


def host_gradients(stage: Stage) -> dict[str, Tensor]:
    """Gradients of the host by parameter name."""
    return {name: p.grad.clone() for name, p in stage.host_parameters.items() if p.grad is not None}


def randomise(layer: LayerSeeds, seed: int = 0) -> None:
    """Give every seed weights of its own, output projections included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in layer.bank.weights.values():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * 0.3)
