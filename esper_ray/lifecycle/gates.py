"""One pure function per gated transition: `None` lets the seed pass, a sentence refuses it.

A metric that was not measured, or is not a finite number, never satisfies a clause.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from esper_ray.errors import ConfigError
from esper_ray.lifecycle.context import TransitionContext
from esper_ray.lifecycle.states import ExtendedLifecycle

_S = ExtendedLifecycle


@dataclass(frozen=True, slots=True)
class GateSettings:
    """Thresholds of the gates; losses are relative, epochs are lifecycle epochs."""

    reconstruction_loss_max: float = 0.01
    delta_ratio_max: float = 0.5
    alpha_one_loss_ratio_max: float = 1.01
    performance_delta_min: float = 0.0
    stability_min: float = 0.8
    cull_performance_delta: float = -0.05
    cull_error_rate: float = 0.1
    cull_error_count: int = 5
    inconclusive_epochs: int = 90
    improvement_min: float = 0.002
    final_stability_min: float = 0.95

    def __post_init__(self) -> None:
        for f in fields(self):
            if math.isnan(getattr(self, f.name)):  # compares false, and would open a gate
                raise ConfigError(f"gate threshold {f.name} must be a number, got nan")

    def changed(self) -> dict[str, float]:
        """Thresholds that differ from the defaults, by name."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if getattr(self, f.name) != f.default
        }


Gate = Callable[[TransitionContext, GateSettings], str | None]


def _metric(context: TransitionContext, name: str) -> float | None:
    value = context.performance_metrics.get(name)
    return value if value is not None and math.isfinite(value) else None


def _refuse(
    context: TransitionContext, name: str, passes: Callable[[float], bool], rule: str
) -> str | None:
    value = _metric(context, name)
    if value is None:
        return f"{name} was not measured, and {rule} is needed"
    return None if passes(value) else f"{name} is {value:.6g}, and {rule} is needed"


def reconstruction(context: TransitionContext, settings: GateSettings) -> str | None:
    """TRAINING -> GRAFTING: the seed has learned its objective and would do no harm."""
    if context.metadata.get("objective") == "reconstruction":
        limit = settings.reconstruction_loss_max
        return _refuse(context, "reconstruction_loss", lambda v: v <= limit, f"<= {limit}")
    ratio, rise = settings.delta_ratio_max, settings.alpha_one_loss_ratio_max
    return (
        _refuse(context, "local_loss", math.isfinite, "a finite value")
        or _refuse(context, "delta_ratio", lambda v: v <= ratio, f"<= {ratio}")
        or _refuse(context, "alpha_one_loss_ratio", lambda v: v <= rise, f"<= {rise}")
    )


def fully_blended(context: TransitionContext, settings: GateSettings) -> str | None:
    """GRAFTING -> STABILIZATION: alpha has reached exactly 1."""
    del settings
    return _refuse(context, "alpha", lambda v: v == 1.0, "exactly 1")


def _refuse_bound(context: TransitionContext, name: str, least: float) -> str | None:
    """Refuse unless the lower bound, or where no interval is given the mean, is above `least`."""
    mean, low_name = _metric(context, name), f"{name}_low"
    given = low_name in context.performance_metrics
    low = _metric(context, low_name) if given else mean
    if mean is None or low is None:
        return f"{name} was not measured, and a lower bound > {least:g} is needed"
    if low > least:
        return None
    return f"the lower bound of {name} is {low:.6g}, and > {least:g} is needed"


def positive_evaluation(context: TransitionContext, settings: GateSettings) -> str | None:
    """EVALUATING -> FINE_TUNING: the seed helps, with confidence, and the loss is steady."""
    steady = settings.stability_min
    return _refuse_bound(context, "performance_delta", settings.performance_delta_min) or _refuse(
        context, "stability_score", lambda v: v >= steady, f">= {steady}"
    )


def negative_evaluation(context: TransitionContext, settings: GateSettings) -> str | None:
    """EVALUATING -> CULLED: the seed harms, fails, or stays inconclusive for too long."""
    delta = _metric(context, "performance_delta")
    error_rate = _metric(context, "error_rate")
    if delta is not None and delta < settings.cull_performance_delta:
        return None
    if error_rate is not None and error_rate > settings.cull_error_rate:
        return None
    if context.error_count > settings.cull_error_count:
        return None
    late = context.epochs_in_state >= settings.inconclusive_epochs
    if late and positive_evaluation(context, settings) is not None:
        return None
    return "the evaluation is neither negative nor inconclusive for long enough"


def improvement(context: TransitionContext, settings: GateSettings) -> str | None:
    """FINE_TUNING -> FOSSILIZED: the improvement is large enough, certain and steady."""
    least, steady = settings.improvement_min, settings.final_stability_min
    return (
        _refuse(context, "total_improvement", lambda v: v >= least, f">= {least}")
        or _refuse_bound(context, "total_improvement", 0.0)
        or _refuse(context, "final_stability", lambda v: v >= steady, f">= {steady}")
    )


GATES: Mapping[tuple[ExtendedLifecycle, ExtendedLifecycle], Gate] = MappingProxyType(
    {
        (_S.TRAINING, _S.GRAFTING): reconstruction,
        (_S.GRAFTING, _S.STABILIZATION): fully_blended,
        (_S.EVALUATING, _S.FINE_TUNING): positive_evaluation,
        (_S.EVALUATING, _S.CULLED): negative_evaluation,
        (_S.FINE_TUNING, _S.FOSSILIZED): improvement,
    }
)
