"""What a coordinator knows of a run besides its layers; stored in every commit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper_ray.errors import CorruptError
from esper_ray.events.messages import TelemetryBatch, TransitionBatch
from esper_ray.grafting import Ending, StrategyOutcomes
from esper_ray.growth import judging
from esper_ray.growth.governor import Level
from esper_ray.lifecycle import ExtendedLifecycle
from esper_ray.policy import Measurement

_S = ExtendedLifecycle
_ENDINGS: Final[Mapping[ExtendedLifecycle, Ending]] = {
    _S.FOSSILIZED: "fossilized",
    _S.CULLED: "culled",
    _S.ROLLED_BACK: "rolled_back",
}
_FLOATS: Final = ("gate_losses", "gate_accuracies", "losses")


@dataclass(slots=True)
class Progress:
    """Counters and recent gate results of a run."""

    number: int = 0
    sequence: int = 0
    transitions: int = 0
    states_visited: list[str] = field(default_factory=lambda: [_S.DORMANT.name])
    gate_losses: list[float] = field(default_factory=list)
    gate_accuracies: list[float] = field(default_factory=list)
    seeds: dict[str, dict[str, int]] = field(default_factory=dict)
    outcomes: StrategyOutcomes = field(default_factory=StrategyOutcomes)
    losses: list[float] = field(default_factory=list)
    """The highest task loss of all steps, then the last ones; see `level`."""

    def observe(self, loss: float, accuracy: float) -> None:
        """Keep the gate split's newest results."""
        window = judging.STABILITY_WINDOW
        self.gate_losses = [*self.gate_losses, loss][-window:]
        self.gate_accuracies = [*self.gate_accuracies, accuracy][-window:]

    def level(self, deviations: float) -> Level:
        """What is usual for a task loss."""
        return Level(deviations, tuple(self.losses[1:]), max(self.losses[:1], default=-math.inf))

    def trained(self, losses: Sequence[float]) -> None:
        """Keep the task losses of an epoch's steps."""
        level = self.level(0.0)
        for loss in losses:
            level = level.after(loss)
        self.losses = [level.highest, *level.recent]

    def count(
        self,
        applied: TransitionBatch,
        telemetry: TelemetryBatch,
        measured: Mapping[int, Measurement],
    ) -> None:
        """Add rows that a layer says it has applied."""
        target, ids = applied.target, applied.seed_ids
        self.transitions += int((~applied.replants).sum())
        reached = {_S(code).name for code in target.tolist()}
        self.states_visited = [s.name for s in _S if s.name in {*self.states_visited, *reached}]
        born = target == _S.GERMINATED
        outcomes = self.outcomes.count_planted(applied.strategy[born])
        judged = ids[applied.expected_state == _S.EVALUATING]
        deltas = [measured[i].delta if i in measured else np.nan for i in judged.tolist()]
        outcomes = outcomes.count_evaluated(telemetry.strategy[judged], np.array(deltas))
        for state, ending in _ENDINGS.items():
            outcomes = outcomes.count_ended(telemetry.strategy[ids[target == state]], ending)
        self.outcomes = outcomes

    def to_json(self) -> dict[str, object]:
        """For the run commit; repr keeps every bit of a float."""
        plain: dict[str, object] = {name: getattr(self, name) for name in self.__slots__}
        plain |= {name: [repr(value) for value in getattr(self, name)] for name in _FLOATS}
        return plain | {"outcomes": self.outcomes.to_json()}

    @classmethod
    def from_json(cls, body: Mapping[str, object]) -> Progress:
        """The inverse of `to_json`; CorruptError for anything else."""
        stored = {"losses": [], **body}  # which older commits do not hold
        try:
            _check(stored)
            floats = {name: [float(v) for v in _texts(stored.pop(name))] for name in _FLOATS}
            outcomes = StrategyOutcomes.from_json(str(stored.pop("outcomes")))
            return cls(**stored, **floats, outcomes=outcomes)  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"the coordinator's progress cannot be read: {error}") from error


def _check(stored: Mapping[str, object]) -> None:
    for name in ("number", "sequence", "transitions"):
        if not _is_count(stored[name]):
            raise ValueError(f"{name} is {stored[name]!r}")
    if not {*_texts(stored["states_visited"])} <= {*_S.__members__}:
        raise ValueError(f"states_visited is {stored['states_visited']!r}")
    seeds = stored["seeds"]
    if not isinstance(seeds, dict) or not all(_is_census(states) for states in seeds.values()):
        raise ValueError(f"seeds are {seeds!r}")


def _is_census(value: object) -> bool:
    return isinstance(value, dict) and all(
        name in _S.__members__ and _is_count(count) for name, count in value.items()
    )


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _texts(value: object) -> list[str]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, got {type(value).__name__}")
    return [str(item) for item in value]


def occupied(telemetry: TelemetryBatch) -> NDArray[np.int64]:
    """(11,) seeds of a layer by state."""
    return np.bincount(telemetry.state, minlength=len(_S))


def count_seeds(
    telemetry: Mapping[str, TelemetryBatch], applied: Sequence[TransitionBatch]
) -> dict[str, dict[str, int]]:
    """Seeds by layer and state after some batches; states without a seed are left out."""
    moved = {batch.layer_id: batch for batch in applied}
    counts: dict[str, dict[str, int]] = {}
    for layer_id, seen in telemetry.items():
        state = seen.state.copy()
        if layer_id in moved:
            state[moved[layer_id].seed_ids] = moved[layer_id].target
        by_state = np.bincount(state, minlength=len(_S))
        counts[layer_id] = {s.name: int(by_state[s]) for s in _S if by_state[s]}
    return counts
