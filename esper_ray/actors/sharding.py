"""A layer's messages in parts, one for each shard, and back: seed ids are global outside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from esper_ray.events.messages import (
    GraftingSignals,
    MetricsBatch,
    OlderRows,
    StageReport,
    TelemetryBatch,
    TransitionBatch,
    TransitionReceipt,
)
from esper_ray.growth.shard import seed_bounds

Batch = TypeVar("Batch", TransitionBatch, MetricsBatch, OlderRows)


def merged_reports(reports: Iterable[StageReport]) -> list[StageReport]:
    """One report for each stage, in order, out of one for each shard."""
    ordered = sorted(reports, key=lambda report: (report.stage, report.shard))
    return [_merged(list(shards)) for _, shards in groupby(ordered, lambda report: report.stage)]


def _merged(shards: Sequence[StageReport]) -> StageReport:
    by_layer = zip(*(report.telemetry for report in shards), strict=True)
    telemetry = tuple(merged_telemetry(parts) for parts in by_layer)
    broken = next((report.broken for report in shards if report.broken), "")
    return replace(shards[0], telemetry=telemetry, broken=broken)


def merged_telemetry(parts: Sequence[TelemetryBatch]) -> TelemetryBatch:
    """A layer's telemetry out of that of its shards, in order."""
    if len(parts) == 1:
        return parts[0]
    first = np.cumsum([0, *(len(part.state) for part in parts)])
    signals = [
        replace(part.signals, seed_ids=part.signals.seed_ids + begin)
        for part, begin in zip(parts, first, strict=False)
    ]
    return replace(parts[0], **_joined(parts), signals=GraftingSignals(**_joined(signals)))


def _joined(parts: Sequence[Any]) -> dict[str, Any]:
    names = _arrays(parts[0])
    return {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}


def _arrays(batch: Any) -> list[str]:
    return [f.name for f in fields(batch) if isinstance(getattr(batch, f.name), np.ndarray)]


def rows_of_shards(
    seed_ids: NDArray[np.int64], num_seeds: int, shards: int
) -> list[NDArray[np.int64]]:
    """For each shard the positions of its seeds among `seed_ids`."""
    bounds = seed_bounds(num_seeds, shards)
    return [np.flatnonzero((seed_ids >= first) & (seed_ids < last)) for first, last in bounds]


def split_rows(batch: Batch, num_seeds: int, shards: int) -> list[Batch]:
    """A batch for each shard, by seed ids of its own; some may have no rows."""
    if shards == 1:
        return [batch]
    firsts = [first for first, _ in seed_bounds(num_seeds, shards)]
    rows = rows_of_shards(batch.seed_ids, num_seeds, shards)
    return [_taken(batch, own, first) for own, first in zip(rows, firsts, strict=True)]


def _taken(batch: Batch, rows: NDArray[np.int64], first: int) -> Batch:
    columns: dict[str, Any] = {name: getattr(batch, name)[rows] for name in _arrays(batch)}
    return replace(batch, **{**columns, "seed_ids": columns["seed_ids"] - first})


def merged_receipt(
    seed_ids: NDArray[np.int64] | None, num_seeds: int, parts: Sequence[TransitionReceipt]
) -> TransitionReceipt:
    """The receipt of a batch of `seed_ids` out of those of its shards, in order.

    Of a batch that is not at hand, the rows come shard by shard.
    """
    if len(parts) == 1:
        return parts[0]
    if seed_ids is None:
        return replace(parts[0], **_joined(parts))
    applied = np.zeros(len(seed_ids), np.bool_)
    reason = np.zeros(len(seed_ids), np.uint8)
    rows = rows_of_shards(seed_ids, num_seeds, len(parts))
    for own, part in zip(rows, parts, strict=True):
        applied[own], reason[own] = part.applied, part.reason
    return replace(parts[0], applied=applied, reason=reason)
