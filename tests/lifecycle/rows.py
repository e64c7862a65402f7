"""Requests for tests, written a row at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from esper_ray.lifecycle import Cause, Decisions, LifecycleManager, Refusal, Requests
from esper_ray.lifecycle import ExtendedLifecycle as S

OPEN: Mapping[str, float] = {
    "local_loss": 0.3,
    "reconstruction_loss": 0.001,
    "delta_ratio": 0.1,
    "alpha_one_loss_ratio": 1.0,
    "alpha": 1.0,
    "performance_delta": 0.1,
    "performance_delta_low": 0.05,
    "stability_score": 0.99,
    "total_improvement": 0.1,
    "total_improvement_low": 0.05,
    "final_stability": 0.99,
    "error_rate": 0.5,
}
"""Numbers that open every gate, that of EVALUATING -> CULLED by its error rate."""


class Row(NamedTuple):
    """One seed's request; states may be any number."""

    source: int
    target: int
    epochs: int = 1_000
    cause: int = Cause.POLICY
    errors: int = 0
    metrics: Mapping[str, float] = OPEN
    generation: int = 0
    seed: int = -1
    """-1 = the row's position."""


def requests(
    rows: Sequence[Row],
    *,
    objective: str = "gradient_target",
    layer_id: str = "layer",
    names: Sequence[str] | None = None,
) -> Requests:
    """A batch of rows; `names` says which metrics have a column, by default all that a row has."""
    if names is None:
        names = sorted({name for row in rows for name in row.metrics})
    ids = [i if row.seed < 0 else row.seed for i, row in enumerate(rows)]
    columns = {
        name: np.array([row.metrics.get(name, math.nan) for row in rows], dtype=np.float64)
        for name in names
    }
    return Requests(
        layer_id=layer_id,
        seed_ids=np.array(ids, dtype=np.int64),
        generation=np.array([row.generation for row in rows], dtype=np.int16),
        source=np.array([row.source for row in rows], dtype=np.int32),
        target=np.array([row.target for row in rows], dtype=np.int32),
        cause=np.array([row.cause for row in rows], dtype=np.int32),
        epochs_in_state=np.array([row.epochs for row in rows], dtype=np.int32),
        error_count=np.array([row.errors for row in rows], dtype=np.int32),
        metrics=columns,
        objective=objective,
    )


def judge(
    *rows: Row, manager: LifecycleManager | None = None, objective: str = "gradient_target"
) -> Decisions:
    return (manager or LifecycleManager()).judge(requests(rows, objective=objective))


def names_of(decisions: Decisions) -> list[str]:
    """Name of each row's refusal."""
    return [Refusal(code).name for code in decisions.reason.tolist()]


def refusal_of(row: Row, manager: LifecycleManager | None = None) -> Refusal:
    return Refusal(int(judge(row, manager=manager).reason[0]))


def explained(row: Row, manager: LifecycleManager | None = None) -> str:
    """What one row's requester is told."""
    return judge(row, manager=manager).explain(0).verdict


LIVE = tuple(s for s in S if s < S.FOSSILIZED)
