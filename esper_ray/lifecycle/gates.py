"""Gates as data: which measured number must stand in which relation to which threshold.

One evaluation serves single seeds and whole batches: a value is a float or an array (rows,), and
the operators used here work on both. What was not measured, or is not finite, satisfies no clause.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from esper_ray.errors import ConfigError
from esper_ray.lifecycle.states import ExtendedLifecycle

_S = ExtendedLifecycle

Value = Any
"""A float, or an array of float64 (rows,)."""
Values = Mapping[str, Value]


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
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            whole = name not in _COUNTS or value == int(value) if math.isfinite(value) else False
            if not (whole and low <= value <= high):
                number = "a whole number" if name in _COUNTS else "a number"
                raise ConfigError(
                    f"gate threshold {name} is {value}, not {number} from {low:g} to {high:g}",
                    "change lifecycle.gates",
                )

    @classmethod
    def of(cls, thresholds: Mapping[str, float]) -> GateSettings:
        """Defaults with some thresholds changed; counts become whole numbers."""
        given: dict[str, Any] = dict(thresholds)
        for name in _COUNTS:
            if name in given and math.isfinite(given[name]) and given[name] == int(given[name]):
                given[name] = int(given[name])
        return cls(**given)

    def changed(self) -> dict[str, float]:
        """Thresholds that differ from the defaults, by name."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if getattr(self, f.name) != f.default
        }


RANGES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "reconstruction_loss_max": (0.0, 1e9),
        "delta_ratio_max": (0.0, 1e9),
        "alpha_one_loss_ratio_max": (0.0, 1e9),
        "performance_delta_min": (-1.0, 1.0),
        "stability_min": (0.0, 1.0),
        "cull_performance_delta": (-1e9, 1.0),
        "cull_error_rate": (0.0, 1.0),
        "cull_error_count": (0, 1e9),
        "inconclusive_epochs": (0, 1e9),
        "improvement_min": (0.0, 1.0),
        "final_stability_min": (0.0, 1.0),
    }
)
"""Smallest and largest value of every threshold."""
_COUNTS = ("cull_error_count", "inconclusive_epochs")

_RELATIONS: Mapping[str, Callable[[Value, float], Value]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
    "exactly": operator.eq,
}
_LOWEST = -math.inf


@dataclass(frozen=True, slots=True)
class Clause:
    """`metric` stands in `relation` to `limit`: a number, or the name of a threshold.

    Where `metric` was never given, `fallback` is read instead.
    """

    metric: str
    relation: str
    limit: float | str
    fallback: str = ""

    def value(self, values: Values) -> Value:
        """What was measured, NaN where nothing was."""
        return values.get(self.metric, values.get(self.fallback, math.nan))

    def number(self, settings: GateSettings) -> float:
        """The limit as a number."""
        return getattr(settings, self.limit) if isinstance(self.limit, str) else self.limit

    def holds(self, values: Values, settings: GateSettings) -> Value:
        """True where the clause is satisfied."""
        value = self.value(values)
        holds = _RELATIONS[self.relation](value, self.number(settings))  # never for NaN
        return holds & (value < math.inf if self.relation[0] == ">" else value > _LOWEST)

    def rule(self, settings: GateSettings) -> str:
        """What is asked, such as ">= 0.8"."""
        if math.isinf(self.number(settings)):
            return "a finite value"
        return f"{self.relation} {self.number(settings):g}"


@dataclass(frozen=True, slots=True)
class Shut:
    """Holds where another gate does not open."""

    gate: Gate

    def holds(self, values: Values, settings: GateSettings) -> Value:
        """True where the gate is shut."""
        opens = self.gate.opens(values, settings)
        return (not opens) if isinstance(opens, bool) else ~opens


@dataclass(frozen=True, slots=True)
class Gate:
    """Opens where everything in one of its `ways` holds; `otherwise` says what was missing."""

    name: str
    about: str
    ways: tuple[tuple[Clause | Shut, ...], ...]
    otherwise: str = ""
    reads: frozenset[str] = field(init=False, repr=False, compare=False)
    """Names of all values that it may look at."""

    def __post_init__(self) -> None:
        names: set[str] = set()
        for way in self.ways:
            for condition in way:
                if isinstance(condition, Shut):
                    names |= condition.gate.reads
                else:
                    names |= {condition.metric, condition.fallback}
        object.__setattr__(self, "reads", frozenset(names))

    def opens(self, values: Values, settings: GateSettings) -> Value:
        """True where the gate opens: a bool for floats, an array of bool for arrays."""
        opens: Value = False
        for way in self.ways:
            holds: Value = True
            for condition in way:
                holds = condition.holds(values, settings) & holds
            opens = holds | opens
        return opens

    def clauses(self) -> Iterator[Clause]:
        """Every comparison of the gate, then those of gates that it wants shut."""
        for way in self.ways:
            yield from (condition for condition in way if isinstance(condition, Clause))
        for way in self.ways:
            for condition in way:
                if isinstance(condition, Shut):
                    yield from condition.gate.clauses()

    def thresholds(self, settings: GateSettings) -> dict[str, str]:
        """What each metric is compared with, by the metric's name; its first number counts."""
        rules: dict[str, str] = {}
        for clause in sorted(self.clauses(), key=lambda c: math.isinf(c.number(settings))):
            rules.setdefault(clause.metric, clause.rule(settings))
        return rules

    def refusal(self, values: Mapping[str, float], settings: GateSettings) -> str | None:
        """None where the gate opens for one seed, else a sentence that says what is missing."""
        if self.opens(values, settings):
            return None
        if self.otherwise:
            return self.otherwise
        missing = next(c for c in self.clauses() if not c.holds(values, settings))
        return _sentence(missing, float(missing.value(values)), missing.rule(settings))


def _sentence(clause: Clause, value: float, rule: str) -> str:
    name = clause.metric
    if not math.isfinite(value):
        return f"{name} was not measured, and {rule} is needed"
    if name.endswith("_low"):
        name = f"the lower bound of {name.removesuffix('_low')}"
    return f"{name} is {value:.6g}, and {rule} is needed"


def _bound(metric: str, limit: float | str) -> tuple[Clause, Clause]:
    """The mean was measured, and its lower bound, where one was given, is above the limit."""
    low = Clause(f"{metric}_low", ">", limit, fallback=metric)
    return Clause(metric, "<", math.inf), low


RECONSTRUCTION = Gate(
    "reconstruction",
    "The seed reproduces its chunk.",
    ((Clause("reconstruction_loss", "<=", "reconstruction_loss_max"),),),
)
READINESS = Gate(
    "readiness",
    "The seed has learned its objective and would do no harm.",
    (
        (
            Clause("local_loss", "<", math.inf),
            Clause("delta_ratio", "<=", "delta_ratio_max"),
            Clause("alpha_one_loss_ratio", "<=", "alpha_one_loss_ratio_max"),
        ),
    ),
)
FULLY_BLENDED = Gate(
    "fully_blended", "Alpha has reached exactly 1.", ((Clause("alpha", "exactly", 1.0),),)
)
POSITIVE_EVALUATION = Gate(
    "positive_evaluation",
    "The seed helps, with confidence, and the loss is steady.",
    (
        (
            *_bound("performance_delta", "performance_delta_min"),
            Clause("stability_score", ">=", "stability_min"),
        ),
    ),
)
NEGATIVE_EVALUATION = Gate(
    "negative_evaluation",
    "The seed harms, fails, or stays inconclusive for too long.",
    (
        (Clause("performance_delta", "<", "cull_performance_delta"),),
        (Clause("error_rate", ">", "cull_error_rate"),),
        (Clause("error_count", ">", "cull_error_count"),),
        (Clause("epochs_in_state", ">=", "inconclusive_epochs"), Shut(POSITIVE_EVALUATION)),
    ),
    "the evaluation is neither negative nor inconclusive for long enough",
)
IMPROVEMENT = Gate(
    "improvement",
    "The improvement is large enough, certain and steady.",
    (
        (
            Clause("total_improvement", ">=", "improvement_min"),
            *_bound("total_improvement", 0.0),
            Clause("final_stability", ">=", "final_stability_min"),
        ),
    ),
)

GATES: Mapping[tuple[ExtendedLifecycle, ExtendedLifecycle], Gate] = MappingProxyType(
    {
        (_S.TRAINING, _S.GRAFTING): READINESS,
        (_S.GRAFTING, _S.STABILIZATION): FULLY_BLENDED,
        (_S.EVALUATING, _S.FINE_TUNING): POSITIVE_EVALUATION,
        (_S.EVALUATING, _S.CULLED): NEGATIVE_EVALUATION,
        (_S.FINE_TUNING, _S.FOSSILIZED): IMPROVEMENT,
    }
)
"""The gate of each gated move; `gate_of` also looks at the objective."""


def gate_of(source: int, target: int, objective: str) -> Gate | None:
    """The gate between two states for seeds that were trained by `objective`."""
    gate = GATES.get((_S(source), _S(target)))
    return RECONSTRUCTION if gate is READINESS and objective == "reconstruction" else gate
