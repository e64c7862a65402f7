"""The columns of a layer's seeds, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper_ray.grafting import GraftingMemory
from esper_ray.lifecycle import ExtendedLifecycle
from esper_ray.seeds.mirror import MirroredBuffers

HISTORY_LENGTH: Final = 10


@dataclass(frozen=True, slots=True)
class SeedView:
    """Copy of the columns that control code reads, as of the last change; (seeds,) each."""

    state: NDArray[np.int32]
    epochs_in_state: NDArray[np.int32]
    generation: NDArray[np.int16]
    strategy: NDArray[np.int32]
    error_count: NDArray[np.int32]
    alpha: NDArray[np.float32]

    def rows(self, *states: ExtendedLifecycle) -> NDArray[np.int64]:
        """Ids of the seeds in one of `states`, ascending."""
        return np.flatnonzero(np.isin(self.state, states))


class SeedRow(NamedTuple):
    """One seed: its eight columns, the ring of its history, counts, metrics, alpha, generation."""

    columns: list[int]
    ring: list[list[int]]
    transitions: int
    metrics: list[float]
    valid: int
    alpha: float
    generation: int


class SeedColumns(MirroredBuffers):
    """A row per seed: `state_tensor`, history, metrics, alpha and generation.

    `state_tensor` is (seeds, 8) int32, `transition_history` (seeds, 10, 2) int32 with
    [from | to << 8 | cause << 16, lifecycle epoch] and `performance_metrics` (seeds, 4) float32:
    loss, accuracy, stability, efficiency, valid where the bit of `metrics_valid` is set.
    """

    LIFECYCLE_STATE: Final = 0
    BLUEPRINT_ID: Final = 1
    EPOCHS_IN_STATE: Final = 2
    GRAFTING_STRATEGY: Final = 3
    PARENT_STATE: Final = 4
    CHECKPOINT_ID: Final = 5
    EVALUATION_SCORE: Final = 6
    ERROR_COUNT: Final = 7

    columns: Tensor
    history: Tensor
    transition_count: Tensor
    metrics: Tensor
    metrics_valid: Tensor
    alpha: Tensor
    generation: Tensor

    def __init__(self, num_seeds: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.num_seeds = num_seeds
        columns = torch.zeros(8, num_seeds, dtype=torch.int32)
        columns[[self.BLUEPRINT_ID, self.PARENT_STATE, self.CHECKPOINT_ID]] = -1
        for name, value in {  # rows last: a column is contiguous
            "columns": columns,
            "history": torch.zeros(HISTORY_LENGTH, 2, num_seeds, dtype=torch.int32),
            "transition_count": torch.zeros(num_seeds, dtype=torch.int16),
            "metrics": torch.zeros(4, num_seeds),
            "metrics_valid": torch.zeros(num_seeds, dtype=torch.uint8),
            "alpha": torch.zeros(num_seeds),
            "generation": torch.zeros(num_seeds, dtype=torch.int16),
        }.items():
            self.register_buffer(name, value)
        self.grafting = GraftingMemory()
        # Lists of one, since modules set attributes slowly.
        self._views: list[SeedView] = []
        self._changes = [0]
        self.to(device)

    @property
    def state_tensor(self) -> Tensor:
        """(seeds, 8) int32, the seed documents' layout, as a view."""
        return self.columns.T

    @property
    def transition_history(self) -> Tensor:
        """(seeds, 10, 2) int32 ring, as a view; entry n lies at n % 10."""
        return self.history.permute(2, 0, 1)

    @property
    def performance_metrics(self) -> Tensor:
        """(seeds, 4) float32, as a view."""
        return self.metrics.T

    @property
    def lifecycle_state(self) -> Tensor:
        """(seeds,) int32 state codes."""
        return self.columns[self.LIFECYCLE_STATE]

    def view(self) -> SeedView:
        """Copy of the control columns; made once per change, never inside a step."""
        with self._latch:
            if not self._views:
                self._views.append(self._look())
            return self._views[0]

    def rows(self, seed_ids: NDArray[np.int64]) -> SeedView:
        """The same for some seeds only, each row as one writer left it."""
        with self._latch:
            return self._look(seed_ids)

    def _look(self, ids: NDArray[np.int64] | None = None) -> SeedView:
        columns = self.fetch("columns")
        shown = (
            columns[self.LIFECYCLE_STATE],
            columns[self.EPOCHS_IN_STATE],
            self.host("generation"),
            columns[self.GRAFTING_STRATEGY],
            columns[self.ERROR_COUNT],
            self.host("alpha"),
        )
        return SeedView(*((c.copy() if ids is None else c[ids]) for c in shown))

    def last_change(self, ids: NDArray[np.int64] | None = None) -> NDArray[np.int32]:
        """Lifecycle epoch of the last history entry of some seeds, -1 where there is none."""
        rows = np.arange(self.num_seeds) if ids is None else ids
        count = self.host("transition_count")[rows].astype(np.int64)
        epochs: NDArray[np.int32] = self.host("history")[(count - 1) % HISTORY_LENGTH, 1, rows]
        return np.where(count > 0, epochs, np.int32(-1))

    @property
    def version(self) -> int:
        """Grows whenever a state or an alpha may have changed."""
        return self._changes[0]

    def changed(self) -> None:
        """Drop host copies after tensors were loaded from outside."""
        super().changed()
        self._moved()

    def _moved(self) -> None:
        self._views.clear()
        self._changes[0] += 1

    def seed(self, seed_id: int) -> SeedRow:
        """Everything about one seed, as one writer left it."""
        with self._latch:
            return SeedRow(
                self.fetch("columns")[:, seed_id].tolist(),
                self.host("history")[:, :, seed_id].tolist(),
                int(self.host("transition_count")[seed_id]),
                self.host("metrics")[:, seed_id].tolist(),
                int(self.host("metrics_valid")[seed_id]),
                float(self.host("alpha")[seed_id]),
                int(self.host("generation")[seed_id]),
            )

    def get_extra_state(self) -> Tensor:
        """What strategies remember of the seeds in GRAFTING, (bytes,) uint8, for `state_dict`."""
        return torch.from_numpy(self.grafting.to_bytes())

    def set_extra_state(self, state: Tensor) -> None:
        """The inverse of `get_extra_state`."""
        self.grafting.from_bytes(state.cpu().numpy())
