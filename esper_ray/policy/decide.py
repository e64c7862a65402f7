"""From one layer's report to decisions, and from decisions to its transition batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from esper_ray.events.messages import TransitionBatch
from esper_ray.lifecycle import Decisions, ExtendedLifecycle, LifecycleManager, Refusal
from esper_ray.policy.base import Command, LayerReport, PolicySettings
from esper_ray.policy.threshold import propose

_GERMINATED, _GRAFTING = int(ExtendedLifecycle.GERMINATED), int(ExtendedLifecycle.GRAFTING)
_NONE = np.int32(-1)


def decide(
    report: LayerReport,
    settings: PolicySettings,
    manager: LifecycleManager,
    commands: Mapping[int, Command] | None = None,
) -> Decisions:
    """The verdict on each seed that may move: its first move, or the second where that is refused.

    `commands` by seed id take the place of the policy's own moves. A seed both of whose moves are
    refused is shown with the first.
    """
    requests, second = propose(report, settings, commands or {})
    decided = manager.judge(requests)
    again = np.flatnonzero((decided.reason != Refusal.NONE) & (second.target >= 0))
    retried = manager.judge(
        replace(requests.take(again), target=second.target[again], cause=second.cause[again])
    )
    rows = again[retried.accepted]
    target, cause, reason = requests.target.copy(), requests.cause.copy(), decided.reason.copy()
    target[rows], cause[rows], reason[rows] = second.target[rows], second.cause[rows], Refusal.NONE
    return replace(decided, requests=replace(requests, target=target, cause=cause), reason=reason)


def transition_batch(
    decisions: Decisions,
    settings: PolicySettings,
    number: int,
    epoch: int,
    checkpoint_id: int = -1,
    strategy: NDArray[np.int32] | None = None,
) -> TransitionBatch:
    """A row per decision, accepted or not; `checkpoint_id` marks those that enter GRAFTING.

    `strategy` (rows,) is for those that enter GERMINATED, by default that of the settings.
    """
    asked = decisions.requests
    born, grafted = asked.target == _GERMINATED, asked.target == _GRAFTING
    chosen = np.int32(settings.strategy_id) if strategy is None else strategy
    return TransitionBatch(
        layer_id=asked.layer_id,
        number=number,
        epoch=epoch,
        seed_ids=asked.seed_ids,
        expected_state=asked.source,
        expected_generation=asked.generation,
        target=asked.target,
        cause=asked.cause,
        blueprint_id=_where(born, np.int32(settings.blueprint_id)),
        strategy=_where(born, chosen),
        checkpoint_id=_where(grafted, np.int32(checkpoint_id)),
    )


def _where(rows: NDArray[np.bool_], value: NDArray[np.int32] | np.int32) -> NDArray[np.int32]:
    """`value` in some rows, -1 in the others."""
    if not np.count_nonzero(rows):
        return np.full(len(rows), _NONE)
    return np.where(rows, value, _NONE)
