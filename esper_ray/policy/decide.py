"""From one layer's report to its transition batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from esper_ray.events.messages import TransitionBatch
from esper_ray.lifecycle import (
    Decision,
    ExtendedLifecycle,
    LifecycleManager,
    TransitionRequest,
)
from esper_ray.policy.base import LayerReport, PolicySettings
from esper_ray.policy.threshold import propose

_S = ExtendedLifecycle


def decide(
    report: LayerReport, settings: PolicySettings, manager: LifecycleManager
) -> list[Decision]:
    """The verdict on each seed that asked to move: its first accepted move, else the last no."""
    verdicts: list[Decision] = []
    for alternatives in propose(report, settings):
        decision = manager.judge(alternatives[0])
        for request in alternatives[1:]:
            if decision.accepted:
                break
            decision = manager.judge(request)
        verdicts.append(decision)
    return verdicts


def transition_batch(
    report: LayerReport,
    requests: Sequence[TransitionRequest],
    settings: PolicySettings,
    number: int,
    checkpoint_id: int,
) -> TransitionBatch:
    """One batch for one layer; `checkpoint_id` marks the rows that enter GRAFTING."""
    target = np.array([r.context.target_state for r in requests], dtype=np.int32)
    born, grafted = target == _S.GERMINATED, target == _S.GRAFTING
    return TransitionBatch(
        layer_id=report.telemetry.layer_id,
        number=number,
        epoch=report.telemetry.epoch,
        seed_ids=np.array([r.context.seed_id for r in requests], dtype=np.int64),
        expected_state=np.array([r.context.current_state for r in requests], dtype=np.int32),
        expected_generation=np.array([r.generation for r in requests], dtype=np.int16),
        target=target,
        cause=np.array([r.cause for r in requests], dtype=np.int32),
        blueprint_id=np.where(born, settings.blueprint_id, -1).astype(np.int32),
        strategy=np.where(born, settings.strategy_id, -1).astype(np.int32),
        checkpoint_id=np.where(grafted, checkpoint_id, -1).astype(np.int32),
    )
