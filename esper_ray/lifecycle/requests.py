"""Requests to change state and the verdicts on them, a row per seed."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esper_ray.lifecycle.gates import GateSettings, gate_of
from esper_ray.lifecycle.refusal import REASONS, Refusal
from esper_ray.lifecycle.states import Cause, ExtendedLifecycle

_S = ExtendedLifecycle
_REPLANT, _DORMANT = int(Cause.REPLANT), int(_S.DORMANT)


@dataclass(frozen=True, slots=True)
class Requests:
    """Moves asked for in one layer; every array is (rows,).

    `metrics` holds float64 arrays by the names that gates use, NaN where nothing was measured; a
    name that is absent was measured for no row.
    """

    layer_id: str
    seed_ids: NDArray[np.int64]
    generation: NDArray[np.int16]
    source: NDArray[np.int32]
    target: NDArray[np.int32]
    cause: NDArray[np.int32]
    epochs_in_state: NDArray[np.int32]
    error_count: NDArray[np.int32]
    metrics: Mapping[str, NDArray[np.float64]]
    objective: str = "gradient_target"

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.seed_ids)

    @property
    def replants(self) -> NDArray[np.bool_]:
        """(rows,) True where a terminal seed asks to start a new generation as DORMANT."""
        return np.equal(self.cause, _REPLANT) & np.equal(self.target, _DORMANT)

    def take(self, rows: NDArray[Any]) -> Requests:
        """The rows that a mask or an array of positions picks."""
        arrays = {f.name: getattr(self, f.name)[rows] for f in fields(self)[1:8]}
        metrics = {name: values[rows] for name, values in self.metrics.items()}
        return replace(self, metrics=metrics, **arrays)

    def values(self, rows: NDArray[Any], names: Container[str]) -> dict[str, NDArray[Any]]:
        """What is known of some rows, by those of `names` that exist."""
        counts = {"epochs_in_state": self.epochs_in_state, "error_count": self.error_count}
        return {
            name: values[rows]
            for known in (self.metrics, counts)
            for name, values in known.items()
            if name in names
        }


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why one row was accepted or refused; `verdict` is "accepted" or a sentence."""

    gate: str
    inputs: Mapping[str, float]
    thresholds: Mapping[str, str]
    verdict: str


@dataclass(frozen=True, slots=True)
class Decisions:
    """The verdict on each row of `requests`; `reason` (rows,) holds Refusal codes."""

    requests: Requests
    reason: NDArray[np.uint8]
    gates: GateSettings
    minimum_epochs: NDArray[np.int32]

    @property
    def accepted(self) -> NDArray[np.bool_]:
        """(rows,) True where the move may be made."""
        return np.equal(self.reason, Refusal.NONE)

    def refuse(self, rows: NDArray[Any], reason: Refusal) -> Decisions:
        """The same decisions with some rows refused."""
        changed = self.reason.copy()
        changed[rows] = reason
        return replace(self, reason=changed)

    def take(self, rows: NDArray[Any]) -> Decisions:
        """The decisions on some rows."""
        return replace(self, requests=self.requests.take(rows), reason=self.reason[rows])

    def explain(self, row: int) -> Explanation:
        """Gate, inputs, thresholds and verdict of one row."""
        asked = self.requests
        source, target = int(asked.source[row]), int(asked.target[row])
        code = Refusal(int(self.reason[row]))
        known = min(source, target) >= 0 and max(source, target) < len(_S)
        gate = gate_of(source, target, asked.objective) if known else None
        if gate is None:
            return Explanation("", {}, {}, self._sentence(row, code))
        values = asked.values(np.array([row]), gate.reads)
        read = {name: float(value[0]) for name, value in values.items()}
        inputs = {c.metric: float(c.value(read)) for c in gate.clauses()}
        verdict = self._sentence(row, code)
        if code is Refusal.GATE:
            verdict = gate.refusal(read, self.gates) or verdict
        return Explanation(gate.name, inputs, gate.thresholds(self.gates), verdict)

    def explanations(self) -> Iterator[Explanation]:
        """One explanation per row."""
        return (self.explain(row) for row in range(len(self.requests)))

    def _sentence(self, row: int, code: Refusal) -> str:
        if code is not Refusal.TOO_EARLY:
            return REASONS[code]
        source = int(self.requests.source[row])
        return (
            f"{_S(source).name} lasts at least {self.minimum_epochs[source]} epochs, "
            f"this seed has spent {self.requests.epochs_in_state[row]}"
        )
