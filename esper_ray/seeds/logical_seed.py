"""One seed as an agent of its own, without a state of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from esper_ray.lifecycle import Cause, ExtendedLifecycle, Refusal
from esper_ray.seeds.chunks import ChunkManager
from esper_ray.seeds.columns import HISTORY_LENGTH, SeedColumns, SeedRow

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
        return ExtendedLifecycle(self._row().columns[SeedColumns.LIFECYCLE_STATE])

    @property
    def blueprint_id(self) -> int | None:
        """What it grows, None while it grows nothing."""
        number = self._row().columns[SeedColumns.BLUEPRINT_ID]
        return number if number >= 0 else None

    @property
    def generation(self) -> int:
        """How often it was planted anew."""
        return self._row().generation

    @property
    def alpha(self) -> float:
        """How much of it is blended in."""
        return self._row().alpha

    @property
    def epochs_in_state(self) -> int:
        """Lifecycle epochs since its last transition."""
        return self._row().columns[SeedColumns.EPOCHS_IN_STATE]

    @property
    def history(self) -> list[HistoryEntry]:
        """Its last transitions, at most ten, oldest first."""
        row = self._row()
        kept = range(max(0, row.transitions - HISTORY_LENGTH), row.transitions)
        return [_entry(*row.ring[number % HISTORY_LENGTH]) for number in kept]

    def telemetry(self) -> dict[str, float]:
        """Counts and scores of its row, and the metrics that were measured."""
        row = self._row()
        measured: Mapping[str, float] = {
            name: value
            for bit, (name, value) in enumerate(zip(METRICS, row.metrics, strict=True))
            if row.valid >> bit & 1
        }
        return {
            "epochs_in_state": row.columns[SeedColumns.EPOCHS_IN_STATE],
            "alpha": row.alpha,
            "error_count": row.columns[SeedColumns.ERROR_COUNT],
            "evaluation_score": row.columns[SeedColumns.EVALUATION_SCORE] / 1000,
            **measured,
        }

    def request(self, action: str) -> Refusal:
        """Ask its layer to germinate, cancel, cull, roll back or replant it."""
        return self.host.request(action, [self.seed_id])[0]

    def _row(self) -> SeedRow:
        return self.host.state.seed(self.seed_id)


def _entry(word: int, epoch: int) -> HistoryEntry:
    source, target, cause = word & 0xFF, word >> 8 & 0xFF, word >> 16
    return HistoryEntry(ExtendedLifecycle(source), ExtendedLifecycle(target), Cause(cause), epoch)
