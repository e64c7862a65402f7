"""One seed as an agent of its own, without a state of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from esper_ray.lifecycle import Cause, ExtendedLifecycle, Refusal
from esper_ray.seeds.chunks import ChunkManager
from esper_ray.seeds.columns import HISTORY_LENGTH, SeedColumns

METRICS = ("loss", "accuracy", "stability", "efficiency")


class HistoryEntry(NamedTuple):
    """One transition of a seed."""

    source: ExtendedLifecycle
    target: ExtendedLifecycle
    cause: Cause
    epoch: int


class SeedHost(Protocol):
    """A layer that carries seeds."""

    @property
    def chunks(self) -> ChunkManager:
        """Which features each seed owns."""
        ...

    @property
    def state(self) -> SeedColumns:
        """A row per seed."""
        ...

    def request(self, action: str, seed_ids: list[int]) -> list[Refusal]:
        """Ask for a change of state of some seeds; Refusal.NONE where it was made."""
        ...


@dataclass(frozen=True, slots=True)
class LogicalSeed:
    """The face of seed `seed_id`: chunk, state, history, telemetry, requests.

    Reads and asks; what it shows is the layer's present row. IndexError for an unknown id.
    """

    host: SeedHost
    seed_id: int

    def __post_init__(self) -> None:
        self.host.chunks.bounds(self.seed_id)

    @property
    def bounds(self) -> tuple[int, int]:
        """First feature of its chunk and the one after the last."""
        return self.host.chunks.bounds(self.seed_id)

    def chunk(self, x: Tensor) -> Tensor:
        """Its chunk of x (..., width), as a view."""
        start, stop = self.bounds
        return x[..., start:stop]

    @property
    def state(self) -> ExtendedLifecycle:
        """The state that it is in."""
        return ExtendedLifecycle(self._column(SeedColumns.LIFECYCLE_STATE))

    @property
    def blueprint_id(self) -> int | None:
        """What it grows, None while it grows nothing."""
        number = self._column(SeedColumns.BLUEPRINT_ID)
        return number if number >= 0 else None

    @property
    def generation(self) -> int:
        """How often it was planted anew."""
        return int(self.host.state.host("generation")[self.seed_id])

    @property
    def alpha(self) -> float:
        """How much of it is blended in."""
        return float(self.host.state.host("alpha")[self.seed_id])

    @property
    def epochs_in_state(self) -> int:
        """Lifecycle epochs since its last transition."""
        return self._column(SeedColumns.EPOCHS_IN_STATE)

    @property
    def history(self) -> list[HistoryEntry]:
        """Its last transitions, at most ten, oldest first."""
        state = self.host.state
        count = int(state.host("transition_count")[self.seed_id])
        ring = state.host("history")[:, :, self.seed_id]
        kept = range(max(0, count - HISTORY_LENGTH), count)
        return [_entry(*ring[number % HISTORY_LENGTH].tolist()) for number in kept]

    def telemetry(self) -> dict[str, float]:
        """Counts and scores of its row, and the metrics that were measured."""
        columns = self.host.state
        valid = int(columns.host("metrics_valid")[self.seed_id])
        values = columns.host("metrics")[:, self.seed_id].tolist()
        measured: Mapping[str, float] = {
            name: value
            for bit, (name, value) in enumerate(zip(METRICS, values, strict=True))
            if valid >> bit & 1
        }
        return {
            "epochs_in_state": self.epochs_in_state,
            "alpha": self.alpha,
            "error_count": self._column(SeedColumns.ERROR_COUNT),
            "evaluation_score": self._column(SeedColumns.EVALUATION_SCORE) / 1000,
            **measured,
        }

    def request(self, action: str) -> Refusal:
        """Ask its layer to germinate, cancel, cull, roll back or replant it."""
        return self.host.request(action, [self.seed_id])[0]

    def _column(self, number: int) -> int:
        return int(self.host.state.host("columns")[number, self.seed_id])


def _entry(word: int, epoch: int) -> HistoryEntry:
    source, target, cause = word & 0xFF, word >> 8 & 0xFF, word >> 16
    return HistoryEntry(ExtendedLifecycle(source), ExtendedLifecycle(target), Cause(cause), epoch)
