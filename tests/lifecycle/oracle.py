"""The lifecycle of the semantics document, read a second time: one seed, plain ifs, no tables.

Nothing of `esper_ray.lifecycle` but the numbers of states and causes is used here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from esper_ray.lifecycle import Cause
from esper_ray.lifecycle import ExtendedLifecycle as S

STATE_CODES = {
    "DORMANT": 0,
    "GERMINATED": 1,
    "TRAINING": 2,
    "GRAFTING": 3,
    "STABILIZATION": 4,
    "EVALUATING": 5,
    "FINE_TUNING": 6,
    "FOSSILIZED": 7,
    "CULLED": 8,
    "CANCELLED": 9,
    "ROLLED_BACK": 10,
}
PHASE_2_TABLE = {
    ("DORMANT", "GERMINATED"),
    ("GERMINATED", "TRAINING"),
    ("GERMINATED", "CANCELLED"),
    ("TRAINING", "GRAFTING"),
    ("TRAINING", "CULLED"),
    ("TRAINING", "CANCELLED"),
    ("GRAFTING", "STABILIZATION"),
    ("GRAFTING", "ROLLED_BACK"),
    ("STABILIZATION", "EVALUATING"),
    ("STABILIZATION", "ROLLED_BACK"),
    ("EVALUATING", "FINE_TUNING"),
    ("EVALUATING", "CULLED"),
    ("EVALUATING", "ROLLED_BACK"),
    ("FINE_TUNING", "FOSSILIZED"),
    ("FINE_TUNING", "CULLED"),
    ("FINE_TUNING", "ROLLED_BACK"),
}
TERMINAL = {"FOSSILIZED", "CULLED", "CANCELLED", "ROLLED_BACK"}
MINIMA = {
    "DORMANT": 0,
    "GERMINATED": 0,
    "TRAINING": 100,
    "GRAFTING": 50,
    "STABILIZATION": 20,
    "EVALUATING": 30,
    "FINE_TUNING": 50,
}

Metrics = Mapping[str, float]


def verdict(
    source: int,
    target: int,
    cause: int,
    epochs: int,
    errors: int,
    metrics: Metrics,
    objective: str,
    *,
    replanting: bool = False,
) -> str:
    """Name of the refusal that one request meets; "NONE" where it is accepted."""
    if not (0 <= source <= 10 and 0 <= target <= 10):
        return "UNKNOWN_STATE"
    old, new = S(source).name, S(target).name
    if cause == Cause.REPLANT and new == "DORMANT":
        if not replanting:
            return "REPLANTING_OFF"
        return "NONE" if old in {"CULLED", "CANCELLED", "ROLLED_BACK"} else "NOT_IN_TABLE"
    if old in TERMINAL:
        return "TERMINAL"
    if (old, new) not in PHASE_2_TABLE:
        return "NOT_IN_TABLE"
    waived = new in {"ROLLED_BACK", "CANCELLED"} or (new == "CULLED" and cause == Cause.ERROR)
    if epochs < MINIMA[old] and not waived:
        return "TOO_EARLY"
    return "NONE" if gate_opens(old, new, epochs, errors, metrics, objective) else "GATE"


def gate_opens(
    old: str, new: str, epochs: int, errors: int, metrics: Metrics, objective: str
) -> bool:
    """Whether the gate of a legal move, where it has one, lets one seed pass."""
    if (old, new) == ("TRAINING", "GRAFTING"):
        if objective == "reconstruction":
            return at_most(metrics.get("reconstruction_loss"), 0.01)
        if not measured(metrics.get("local_loss")):
            return False
        if not at_most(metrics.get("delta_ratio"), 0.5):
            return False
        return at_most(metrics.get("alpha_one_loss_ratio"), 1.01)
    if (old, new) == ("GRAFTING", "STABILIZATION"):
        return metrics.get("alpha") == 1.0
    if (old, new) == ("EVALUATING", "FINE_TUNING"):
        return evaluated_well(metrics)
    if (old, new) == ("EVALUATING", "CULLED"):
        if below(metrics.get("performance_delta"), -0.05):
            return True
        if above(metrics.get("error_rate"), 0.1):
            return True
        if errors > 5:
            return True
        return epochs >= 90 and not evaluated_well(metrics)
    if (old, new) == ("FINE_TUNING", "FOSSILIZED"):
        if not at_least(metrics.get("total_improvement"), 0.002):
            return False
        low = metrics.get("total_improvement_low", metrics.get("total_improvement"))
        if not above(low, 0.0):
            return False
        return at_least(metrics.get("final_stability"), 0.95)
    return True


def evaluated_well(metrics: Metrics) -> bool:
    """The gate of EVALUATING -> FINE_TUNING; the mean stands in for a bound that was not given."""
    delta = metrics.get("performance_delta")
    if not measured(delta):
        return False
    if not above(metrics.get("performance_delta_low", delta), 0.0):
        return False
    return at_least(metrics.get("stability_score"), 0.8)


def measured(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def at_most(value: float | None, limit: float) -> bool:
    return value is not None and math.isfinite(value) and value <= limit


def at_least(value: float | None, limit: float) -> bool:
    return value is not None and math.isfinite(value) and value >= limit


def below(value: float | None, limit: float) -> bool:
    return value is not None and math.isfinite(value) and value < limit


def above(value: float | None, limit: float) -> bool:
    return value is not None and math.isfinite(value) and value > limit
