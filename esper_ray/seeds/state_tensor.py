"""The state of every seed of a layer, as columns, with one vectorised writer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from esper_ray.events.messages import MetricsBatch, TransitionBatch
from esper_ray.lifecycle import (
    BLENDED_STATES,
    TERMINAL_STATES,
    ExtendedLifecycle,
    StateTransition,
)

HISTORY_LENGTH: Final = 10
_LARGEST_COUNT: Final = 32_760  # of transitions in int16: whole rings, so that the cursor goes on
_S = ExtendedLifecycle
_STATES: Final = len(ExtendedLifecycle)
_NO_BLUEPRINT: Final = (_S.DORMANT, _S.CULLED, _S.CANCELLED)


class Refusal(IntEnum):
    """Why a row of a transition batch was not applied."""

    NONE = 0
    STALE_STATE = 1
    STALE_GENERATION = 2
    NOT_IN_TABLE = 3
    BATCH_REFUSED = 4


@dataclass(frozen=True, slots=True)
class SeedView:
    """Host copy of the columns that control code reads, as of the last change; (seeds,) each."""

    state: NDArray[np.int32]
    epochs_in_state: NDArray[np.int32]
    generation: NDArray[np.int16]
    strategy: NDArray[np.int32]
    error_count: NDArray[np.int32]
    alpha: NDArray[np.float32]

    def rows(self, *states: ExtendedLifecycle) -> NDArray[np.int64]:
        """Ids of the seeds in one of `states`, ascending."""
        return np.flatnonzero(np.isin(self.state, states))


def _transition_table() -> NDArray[np.bool_]:
    table = np.zeros((_STATES, _STATES), dtype=np.bool_)
    for source, targets in StateTransition.VALID_TRANSITIONS.items():
        table[source, list(targets)] = True
    return table


_TABLE: Final = _transition_table()


def _in_table(source: NDArray[np.int32], target: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Whether each move is legal; one from or to a code that no state has is not."""
    known = (np.minimum(source, target) >= 0) & (np.maximum(source, target) < _STATES)
    return known & _TABLE[np.where(known, source, 0), np.where(known, target, 0)]


def _forget_view(state: ExtendedStateTensor, _: object) -> None:
    state.changed()


def _member(*states: ExtendedLifecycle) -> Tensor:
    return torch.isin(torch.arange(_STATES), torch.tensor(states))


def _to_metric_score(score: Tensor) -> Tensor:
    """Fixed point x 1000, rounded half away from zero, saturated to int32."""
    scaled = score.double().sign() * (score.double().abs() * 1000 + 0.5).floor()
    return scaled.clamp(-(2**31), 2**31 - 1).to(torch.int32)


class ExtendedStateTensor(nn.Module):
    """Columns of `num_seeds` seeds; every change goes through `compare_and_set`, `advance`,
    `record` or `count_errors`.

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
    transition_history: Tensor
    transition_count: Tensor
    performance_metrics: Tensor
    metrics_valid: Tensor
    alpha: Tensor
    generation: Tensor
    pause: Tensor
    pauses: Tensor
    _blended: Tensor
    _terminal: Tensor
    _without_blueprint: Tensor

    def __init__(self, num_seeds: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.num_seeds = num_seeds
        columns = torch.zeros(8, num_seeds, dtype=torch.int32)  # contiguous by column
        columns[[self.BLUEPRINT_ID, self.PARENT_STATE, self.CHECKPOINT_ID]] = -1
        for name, value in {
            "columns": columns,
            "transition_history": torch.zeros(num_seeds, HISTORY_LENGTH, 2, dtype=torch.int32),
            "transition_count": torch.zeros(num_seeds, dtype=torch.int16),
            "performance_metrics": torch.zeros(num_seeds, 4),
            "metrics_valid": torch.zeros(num_seeds, dtype=torch.uint8),
            "alpha": torch.zeros(num_seeds),
            "generation": torch.zeros(num_seeds, dtype=torch.int16),
            "pause": torch.zeros(num_seeds, dtype=torch.int16),
            "pauses": torch.zeros(num_seeds, dtype=torch.int16),
        }.items():
            self.register_buffer(name, value)
        for name, value in {
            "_blended": _member(*BLENDED_STATES),
            "_terminal": _member(*TERMINAL_STATES),
            "_without_blueprint": _member(*_NO_BLUEPRINT),
        }.items():
            self.register_buffer(name, value, persistent=False)
        self._view: SeedView | None = None
        self.register_load_state_dict_post_hook(_forget_view)  # type: ignore[no-untyped-call]
        self.to(device)

    @property
    def state_tensor(self) -> Tensor:
        """(seeds, 8) int32, the seed documents' layout, as a view."""
        return self.columns.T

    @property
    def lifecycle_state(self) -> Tensor:
        """(seeds,) int32 state codes."""
        return self.columns[self.LIFECYCLE_STATE]

    def view(self) -> SeedView:
        """Host copy of the control columns; made once per change, never inside a step."""
        if self._view is None:
            columns = self.columns.cpu().numpy().copy()
            self._view = SeedView(
                state=columns[self.LIFECYCLE_STATE],
                epochs_in_state=columns[self.EPOCHS_IN_STATE],
                generation=self.generation.cpu().numpy().copy(),
                strategy=columns[self.GRAFTING_STRATEGY],
                error_count=columns[self.ERROR_COUNT],
                alpha=self.alpha.float().cpu().numpy().copy(),
            )
        return self._view

    def changed(self) -> None:
        """Drop the host copy after tensors were loaded from outside."""
        self._view = None

    def compare_and_set(
        self, batch: TransitionBatch, mode: Literal["all", "report"] = "report"
    ) -> tuple[NDArray[np.bool_], NDArray[np.uint8]]:
        """Compare-and-set every row that still is in its expected state and generation.

        Returns (applied, reason) per row; mode "all" applies every row or none. Raises ValueError
        for repeated and IndexError for unknown seed ids, with nothing changed.
        """
        ids, view = batch.seed_ids, self.view()
        self._check_ids(ids)
        reason = np.select(
            [
                view.generation[ids] != batch.expected_generation,
                view.state[ids] != batch.expected_state,
                ~_in_table(batch.expected_state, batch.target),
            ],
            [Refusal.STALE_GENERATION, Refusal.STALE_STATE, Refusal.NOT_IN_TABLE],
            Refusal.NONE,
        ).astype(np.uint8)
        if mode == "all" and reason.any():
            reason[reason == Refusal.NONE] = Refusal.BATCH_REFUSED
        applied = reason == Refusal.NONE
        if applied.any():
            self._commit(batch.take(applied))
        return applied, reason

    def _check_ids(self, ids: NDArray[np.int64]) -> None:
        if len(np.unique(ids)) != len(ids):
            raise ValueError(f"seed ids repeat in one batch: {sorted(ids.tolist())}")
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.num_seeds:
            raise IndexError(f"seed ids {ids.tolist()} are not all in 0..{self.num_seeds - 1}")

    def _commit(self, batch: TransitionBatch) -> None:
        device = self.columns.device
        rows = torch.from_numpy(batch.seed_ids).to(device)
        target = torch.from_numpy(batch.target).to(device)
        source = self.columns[self.LIFECYCLE_STATE, rows]
        entry = source | target << 8 | torch.from_numpy(batch.cause).to(device) << 16
        count = self.transition_count[rows]
        slot = count.long() % HISTORY_LENGTH
        epoch = torch.full_like(entry, batch.epoch)
        new = self.columns[:, rows]  # (8, rows), a copy
        new[self.LIFECYCLE_STATE] = target
        new[self.EPOCHS_IN_STATE] = 0
        new[self.PARENT_STATE] = source
        for column, values in (
            (self.BLUEPRINT_ID, batch.blueprint_id),
            (self.GRAFTING_STRATEGY, batch.strategy),
            (self.CHECKPOINT_ID, batch.checkpoint_id),
        ):
            given = torch.from_numpy(values).to(device)
            new[column] = torch.where(given >= 0, given, new[column])
        freed = self._without_blueprint[target.long()]
        new[self.BLUEPRINT_ID] = torch.where(freed, -1, new[self.BLUEPRINT_ID])
        self.columns[:, rows] = new
        self.transition_history[rows, slot] = torch.stack((entry, epoch), dim=1)
        count = torch.where(count < _LARGEST_COUNT, count, HISTORY_LENGTH)
        self.transition_count[rows] = count + 1
        self.alpha[rows] = self._blended[target.long()].to(self.alpha.dtype)
        self.pause[rows] = 0
        self._view = None

    def advance(self, alpha: Tensor, pause: Tensor, pauses: Tensor) -> None:
        """One lifecycle epoch: non-terminal rows grow older, GRAFTING rows take the new columns.

        All arguments are (seeds,); rows that are not in GRAFTING ignore them.
        """
        state = self.lifecycle_state.long()
        epochs = self.columns[self.EPOCHS_IN_STATE]
        older = (epochs.long() + (~self._terminal[state]).long()).clamp(max=2**31 - 1)
        epochs.copy_(older)
        grafting = state == _S.GRAFTING
        for column, value in ((self.alpha, alpha), (self.pause, pause), (self.pauses, pauses)):
            column.copy_(torch.where(grafting, value.to(column.dtype), column))
        self._view = None

    def count_errors(self, failed: Tensor) -> None:
        """Add one to the error count of the rows where `failed` (seeds,) is True."""
        self.columns[self.ERROR_COUNT] += failed.to(torch.int32)
        self._view = None

    def record(self, batch: MetricsBatch) -> None:
        """Store measured metrics; a column whose valid bit is clear keeps its old value.

        Raises as `compare_and_set` does for repeated and unknown seed ids.
        """
        self._check_ids(batch.seed_ids)
        rows = torch.from_numpy(batch.seed_ids).to(self.columns.device)
        values = torch.from_numpy(batch.metrics).to(self.columns.device)
        bits = torch.from_numpy(batch.valid).to(self.columns.device)
        measured = (bits[:, None].int() >> torch.arange(4, device=bits.device)) & 1 == 1
        self.performance_metrics[rows] = torch.where(
            measured, values, self.performance_metrics[rows]
        )
        self.metrics_valid[rows] |= bits
        score = torch.from_numpy(batch.score).to(self.columns.device)
        old = self.columns[self.EVALUATION_SCORE, rows]
        fresh = torch.where(score.isfinite(), _to_metric_score(score.nan_to_num()), old)
        self.columns[self.EVALUATION_SCORE, rows] = fresh
        self._view = None
