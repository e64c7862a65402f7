"""What became of the seeds of each strategy: counts to choose by, and to read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from esper_ray.errors import CorruptError
from esper_ray.grafting.registry import strategy_name

Ending = Literal["fossilized", "culled", "rolled_back"]


@dataclass(frozen=True, slots=True)
class StrategyOutcome:
    """Counts of one strategy; `delta_sum` adds the performance deltas of the evaluated seeds."""

    planted: int = 0
    evaluated: int = 0
    delta_sum: float = 0.0
    fossilized: int = 0
    culled: int = 0
    rolled_back: int = 0

    @property
    def mean_delta(self) -> float:
        """Mean performance delta at EVALUATING; 0 while no seed was evaluated."""
        return self.delta_sum / self.evaluated if self.evaluated else 0.0

    @property
    def tries(self) -> int:
        """Seeds given to the strategy: planted with it, or switched to it and evaluated."""
        return max(self.planted, self.evaluated)


_COUNTED = {field.name: type(field.default) for field in fields(StrategyOutcome)}


@dataclass(frozen=True, slots=True)
class StrategyOutcomes:
    """A StrategyOutcome per strategy name; counting returns a new value."""

    by_name: Mapping[str, StrategyOutcome] = field(default_factory=dict)

    def __getitem__(self, name: str) -> StrategyOutcome:
        return self.by_name.get(name, StrategyOutcome())

    def count_planted(self, strategy: NDArray[np.integer[Any]]) -> StrategyOutcomes:
        """One more planted seed for each entry of `strategy`."""
        return self._plus(strategy, "planted")

    def count_evaluated(
        self, strategy: NDArray[np.integer[Any]], delta: NDArray[np.floating[Any]]
    ) -> StrategyOutcomes:
        """One more evaluation for each entry whose `delta` is finite; others were not measured."""
        known = np.isfinite(delta)
        counted = self._plus(strategy[known], "evaluated")
        return counted._plus(strategy[known], "delta_sum", delta[known])

    def count_ended(self, strategy: NDArray[np.integer[Any]], ending: Ending) -> StrategyOutcomes:
        """One more seed that ended so for each entry of `strategy`."""
        return self._plus(strategy, ending)

    def _plus(
        self,
        strategy: NDArray[np.integer[Any]],
        column: str,
        amounts: NDArray[np.floating[Any]] | None = None,
    ) -> StrategyOutcomes:
        numbers, which = np.unique(strategy, return_inverse=True)
        sums = np.bincount(which, amounts, len(numbers)).tolist()
        changed = dict(self.by_name)
        for number, amount in zip(numbers.tolist(), sums, strict=True):
            name = strategy_name(number)
            old = self[name]
            changed[name] = replace(old, **{column: getattr(old, column) + amount})
        return StrategyOutcomes(changed)

    def to_json(self) -> str:
        """The same text for the same counts; floats are exact."""
        return json.dumps({name: asdict(one) for name, one in self.by_name.items()}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> StrategyOutcomes:
        """Inverse of `to_json`; CorruptError for any other text."""
        try:
            stored = json.loads(text)
            return cls({name: _parsed(counts) for name, counts in stored.items()})
        except (ValueError, TypeError, AttributeError) as error:
            raise CorruptError(
                f"stored strategy outcomes cannot be read: {error}", "restore an older checkpoint"
            ) from error

    def rows(self) -> list[tuple[str | int | float, ...]]:
        """Name, counts and mean delta of every strategy seen, by name."""
        return [
            (name, one.planted, one.evaluated, one.mean_delta, *astuple(one)[3:])
            for name, one in sorted(self.by_name.items())
        ]

    def text(self) -> str:
        """A table for people."""
        lines = ["strategy          planted evaluated mean delta fossilized culled rolled back"]
        for name, planted, evaluated, mean, fossilized, culled, rolled_back in self.rows():
            shown = f"{mean:+.4f}" if evaluated else "-"
            lines.append(
                f"{name:<17} {planted:>7} {evaluated:>9} {shown:>10} "
                f"{fossilized:>10} {culled:>6} {rolled_back:>11}"
            )
        return "\n".join(lines)


def _parsed(counts: Mapping[str, Any]) -> StrategyOutcome:
    if {name: type(value) for name, value in counts.items()} != _COUNTED:
        raise ValueError(f"expected {sorted(_COUNTED)}, got {counts}")
    outcome = StrategyOutcome(**counts)
    whole = (value for value in counts.values() if isinstance(value, int))
    if min(whole) < 0 or not math.isfinite(outcome.delta_sum):
        raise ValueError(f"counts must not be negative nor the sum infinite, got {counts}")
    return outcome
