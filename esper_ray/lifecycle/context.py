"""What is known of a seed that asks to change state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from esper_ray.lifecycle.states import ExtendedLifecycle


@dataclass(frozen=True, slots=True)
class TransitionContext:
    """What a gate may look at when one seed asks to change state.

    `performance_metrics` holds measured numbers only: a name that is absent was not measured.
    `metadata["objective"]` names the TRAINING objective.
    """

    seed_id: int
    current_state: ExtendedLifecycle
    target_state: ExtendedLifecycle
    epochs_in_state: int = 0
    performance_metrics: Mapping[str, float] = field(default_factory=dict)
    error_count: int = 0
    timestamp: float = 0.0
    metadata: Mapping[str, str] = field(default_factory=dict)
