"""What a policy sees and what it may be told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from esper_ray.errors import ConfigError
from esper_ray.events.messages import TelemetryBatch
from esper_ray.lifecycle import Cause, ExtendedLifecycle


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """When seeds are planted and when waiting for a gate ends; all in lifecycle epochs.

    `max_growing` bounds the seeds of one layer between GERMINATED and FINE_TUNING;
    `strategies_switch` says that every strategy may give way to one that reads what a seed gains.
    """

    objective: str = "gradient_target"
    blueprint_id: int = 0
    strategy_id: int = 1
    ramp_epochs: int = 50
    germinate_after: int = 100
    max_growing: int = 1_000
    training_timeout: int = 300
    fine_tuning_timeout: int = 150
    error_limit: int = 5
    strategies_switch: bool = False

    def __post_init__(self) -> None:
        if self.max_growing < 1:
            raise ConfigError(f"max_growing must be at least 1, got {self.max_growing}")


@dataclass(frozen=True, slots=True)
class Command:
    """What a person asked of one seed; `number` says which request it was part of."""

    number: int
    target: ExtendedLifecycle
    cause: Cause


@dataclass(frozen=True, slots=True)
class Measurement:
    """Gate losses of one seed with its alpha at 1 and at 0, all other seeds unchanged.

    `delta` is (loss_off - loss_on) / |loss_off|, `delta_low` its lower 95 % bound.
    """

    loss_on: float
    loss_off: float
    delta: float
    delta_low: float

    @property
    def guilty(self) -> bool:
        """Whether this seed alone keeps the loss from being a number."""
        return math.isfinite(self.loss_off) and not math.isfinite(self.loss_on)


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer at an epoch boundary; `measured` holds only the seeds that were judged."""

    telemetry: TelemetryBatch
    stability: float | None
    measured: Mapping[int, Measurement] = field(default_factory=dict)
