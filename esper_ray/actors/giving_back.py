"""What seeds that have just entered ROLLED_BACK get back of their rows, beside their weights."""

from __future__ import annotations

import asyncio

import numpy as np
from numpy.typing import NDArray

from esper_ray.actors import persistence
from esper_ray.actors.journal import Journal
from esper_ray.actors.pipeline import Pipeline
from esper_ray.errors import CorruptError, EsperError
from esper_ray.events.messages import OlderRows, TelemetryBatch, TransitionBatch
from esper_ray.lifecycle import ExtendedLifecycle
from esper_ray.storage import RunLog, manifest

_S = ExtendedLifecycle


async def give_back(
    pipeline: Pipeline,
    journal: Journal,
    log: RunLog,
    seen: TelemetryBatch,
    applied: TransitionBatch,
    step: int,
) -> list[str]:
    """Give the seeds that a batch has rolled back the strategy and measurements of the commits
    that CHECKPOINT_ID names; what could not be read, a line each: those seeds keep theirs.

    Their weights and moments came back with the transition, from the copies in memory.
    """
    rolled = applied.seed_ids[applied.target == _S.ROLLED_BACK]
    problems = []
    for seq in np.unique(seen.checkpoint_id[rolled]).tolist():
        ids = rolled[seen.checkpoint_id[rolled] == seq]
        try:
            older = await asyncio.to_thread(read_rows, log, applied.layer_id, ids, seq)
            if (older.generation != seen.generation[ids]).any():
                raise CorruptError("it is of another generation")
        except EsperError as error:
            seeds = ", ".join(map(str, ids.tolist()))
            problems.append(
                f"layer {applied.layer_id!r}: seeds {seeds} keep their strategy and measurements, "
                f"for commit {seq} cannot be used: {error}"
            )
            continue
        await pipeline.give_back(older)
        journal.given_back(older, applied.epoch, step)
    return problems


def read_rows(log: RunLog, layer_id: str, seed_ids: NDArray[np.int64], seq: int) -> OlderRows:
    """The rows that a layer's seeds had when commit `seq` let them enter GRAFTING.

    CheckpointNotFound for an unknown commit; CorruptError where it is damaged, or is not the one
    that these seeds entered GRAFTING with, such as one of a run that this one went on from.
    """
    segments = {ref.name: ref for ref in manifest.segments(log.read_commit(seq))}
    columns = persistence.read_checked_state(log, segments, layer_id)
    if len(seed_ids) and seed_ids.max() >= len(columns["seed_id"]):
        raise CorruptError(f"it has no seed {seed_ids.max()}")
    rows = {name: values[seed_ids] for name, values in columns.items()}
    if (rows["lifecycle_state"] != _S.GRAFTING).any() or (rows["checkpoint_id"] != seq).any():
        raise CorruptError("the seeds did not enter GRAFTING there")
    if not np.isfinite(rows["performance_metrics"]).all():
        raise CorruptError("a metric is not finite")
    return OlderRows(
        layer_id=layer_id,
        seed_ids=seed_ids,
        generation=rows["generation"],
        blueprint_id=rows["blueprint_id"],
        grafting_strategy=rows["grafting_strategy"],
        evaluation_score=rows["evaluation_score"],
        performance_metrics=rows["performance_metrics"],
        metrics_valid=rows["metrics_valid"],
    )
