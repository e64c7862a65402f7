"""The one vectorised writer of a layer's seed columns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper_ray.events.messages import GraftingSignals, MetricsBatch, TransitionBatch
from esper_ray.grafting import (
    GraftingSettings,
    StrategySelector,
    advance_alpha,
    unknown_strategies,
)
from esper_ray.lifecycle import (
    BLENDED_STATES,
    LAST_GENERATION,
    MOVES,
    RENEWABLE,
    TERMINAL_STATES,
    Cause,
    ExtendedLifecycle,
    Refusal,
    below,
    first_failed,
)
from esper_ray.seeds.columns import HISTORY_LENGTH, SeedColumns
from esper_ray.seeds.rows import repeated

_LARGEST_COUNT: Final = 32_760  # of transitions in int16: whole rings, so that the cursor goes on
_LARGEST: Final = 2**31 - 1
_S = ExtendedLifecycle
_STATES: Final = len(ExtendedLifecycle)
_CODES: Final = np.arange(_STATES)
_BLENDED: Final = np.isin(_CODES, list(BLENDED_STATES)).astype(np.float32)
_FREED: Final = np.isin(_CODES, [_S.DORMANT, _S.CULLED, _S.CANCELLED])
_CAUSES: Final = len(Cause)
_FIRST_TERMINAL: Final = int(min(TERMINAL_STATES))  # all states from here on are terminal
_GERMINATED, _TRAINING, _GRAFTING = int(_S.GERMINATED), int(_S.TRAINING), int(_S.GRAFTING)

_IS_TERMINAL, _NOT_IN_TABLE = int(Refusal.TERMINAL), int(Refusal.NOT_IN_TABLE)
_CHECKS: Final = (
    Refusal.UNKNOWN_SEED,
    Refusal.DUPLICATE_SEED,
    Refusal.STALE_GENERATION,
    Refusal.STALE_STATE,
    Refusal.UNKNOWN_STATE,
    Refusal.TERMINAL,
    Refusal.NOT_IN_TABLE,
    Refusal.GENERATIONS_USED_UP,
    Refusal.UNKNOWN_STRATEGY,
    Refusal.UNKNOWN_CAUSE,
    Refusal.NO_BLUEPRINT,
)
_METRIC_CHECKS: Final = (Refusal.UNKNOWN_SEED, Refusal.DUPLICATE_SEED, Refusal.NOT_FINITE)

Applied = tuple[NDArray[np.bool_], NDArray[np.uint8]]
"""(applied, reason) per row; a reason is a Refusal code, 0 where the row was applied."""


class ExtendedStateTensor(SeedColumns):
    """Seed columns and the only methods that change them.

    `compare_and_set`, `advance`, `record`, `count_errors` and `give_back`: concurrent callers wait
    for one another, and no row is ever half written.
    """

    # ---- transitions -------------------------------------------------------------------------

    def compare_and_set(
        self, batch: TransitionBatch, mode: Literal["all", "report"] = "report"
    ) -> Applied:
        """Compare-and-set every row that still is in its expected state and generation.

        Refuses other rows one by one; mode "all" applies every row or none. A replanted seed gets
        a fresh row and the next generation; PARENT_STATE is -1 then.
        """
        with self._latch:
            reason = self._refusals(batch)
            if mode == "all" and reason.any():
                reason[reason == 0] = Refusal.BATCH_REFUSED
            applied = reason == 0
            count = np.count_nonzero(applied)
            if count:
                self._commit(batch if count == len(applied) else batch.take(applied))
        return applied, reason

    def _refusals(self, batch: TransitionBatch) -> NDArray[np.uint8]:
        ids, target = batch.seed_ids, batch.target
        rows, known = self._known(ids)
        state = self.host("columns")[self.LIFECYCLE_STATE][rows]
        generation = self.host("generation")[rows]
        valid = below(target, _STATES)
        all_valid = np.count_nonzero(valid) == len(valid)
        move_target = target if all_valid else np.where(valid, target, 0)
        move = MOVES[state, move_target]
        current = (state == batch.expected_state) & (generation == batch.expected_generation)
        twice, strange = repeated(ids), unknown_strategies(batch.strategy)
        reasoned, bare = below(batch.cause, _CAUSES), self._bare(batch, rows, state)
        fine = known & current & (move == 0) & reasoned  # no move leads to 0, the stand-in
        if np.count_nonzero(fine) == len(ids) and not np.count_nonzero(twice | strange | bare):
            return np.zeros(len(ids), dtype=np.uint8)  # the usual case need not know why
        anew = batch.replants  # no move of the table
        terminal = (move == _IS_TERMINAL) & ~anew
        illegal = np.where(anew, ~RENEWABLE[state], move == _NOT_IN_TABLE)
        failed = (
            ~known,
            twice,
            generation != batch.expected_generation,
            state != batch.expected_state,
            ~valid,
            terminal,
            illegal,
            anew & (generation == LAST_GENERATION),
            strange,
            ~reasoned,
            bare,
        )
        return first_failed(_CHECKS, failed)

    def _bare(
        self, batch: TransitionBatch, rows: NDArray[np.int64], state: NDArray[np.int32]
    ) -> NDArray[np.bool_]:
        """Rows that leave GERMINATED for TRAINING, whence all others come, without a blueprint."""
        leaving = np.equal(batch.target, _TRAINING)
        if not np.count_nonzero(leaving):
            return leaving
        own = self.host("columns")[self.BLUEPRINT_ID][rows]
        leaving &= (state == _GERMINATED) & (own < 0) & (batch.blueprint_id < 0)
        return leaving

    def _known(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Ids that can index, and which of them are seeds of this layer."""
        known = below(ids, self.num_seeds)
        return (ids if np.count_nonzero(known) == len(ids) else np.where(known, ids, 0)), known

    def _commit(self, batch: TransitionBatch) -> None:
        rows, source, target = batch.seed_ids, batch.expected_state, batch.target
        columns = self.host("columns")
        columns[self.LIFECYCLE_STATE][rows] = target
        columns[self.EPOCHS_IN_STATE][rows] = 0
        columns[self.PARENT_STATE][rows] = source
        for column, values in (
            (self.BLUEPRINT_ID, batch.blueprint_id),
            (self.GRAFTING_STRATEGY, batch.strategy),
            (self.CHECKPOINT_ID, batch.checkpoint_id),
        ):
            given = (values >= 0).nonzero()[0]
            if len(given):
                columns[column][rows[given]] = values[given]
        freed = _FREED[target].nonzero()[0]
        if len(freed):
            columns[self.BLUEPRINT_ID][rows[freed]] = -1
        self.host("alpha")[rows] = _BLENDED[target]
        self._remember(rows, source | target << 8 | batch.cause << 16, batch.epoch)
        self.grafting.leave(rows[source == _GRAFTING])
        self.grafting.enter(rows[target == _GRAFTING])
        anew = batch.replants.nonzero()[0]
        if len(anew):
            self._renew(rows[anew])
        self.send(rows, "columns", "history", "transition_count", "alpha")
        self._moved()

    def _remember(self, rows: NDArray[np.int64], entry: NDArray[np.int32], epoch: int) -> None:
        counts, ring = self.host("transition_count"), self.host("history").reshape(-1)
        count = counts[rows]
        place = count.astype(np.int64) % HISTORY_LENGTH * (2 * self.num_seeds) + rows
        ring[place] = entry
        ring[place + self.num_seeds] = epoch
        counts[rows] = np.where(count < _LARGEST_COUNT, count, HISTORY_LENGTH) + 1

    def _renew(self, rows: NDArray[np.int64]) -> None:
        """A fresh row of the next generation; the history stays."""
        columns = self.host("columns")
        columns[:, rows] = 0
        for column in (self.BLUEPRINT_ID, self.PARENT_STATE, self.CHECKPOINT_ID):
            columns[column][rows] = -1
        self.host("metrics")[:, rows] = 0
        self.host("metrics_valid")[rows] = 0
        self.host("generation")[rows] += 1
        self.send(rows, "metrics", "metrics_valid", "generation")

    # ---- epochs, errors, metrics -------------------------------------------------------------

    def advance(self, signals: GraftingSignals, settings: GraftingSettings) -> None:
        """One lifecycle epoch: live rows grow older, the alphas of GRAFTING rows move.

        ValueError unless `signals` has exactly the GRAFTING rows; nothing is changed then.
        """
        with self._latch:
            columns, alpha = self.fetch("columns"), self.host("alpha")
            rows, epochs = self.grafting.seed_ids.astype(np.int64), columns[self.EPOCHS_IN_STATE]
            if not np.array_equal(rows, signals.seed_ids):
                raise ValueError("signals are not those of the seeds in GRAFTING")
            live = columns[self.LIFECYCLE_STATE] < _FIRST_TERMINAL
            live &= epochs < _LARGEST
            epochs += live
            if len(rows):
                age, strategy = epochs[rows], columns[self.GRAFTING_STRATEGY]
                selector = StrategySelector(settings)
                chosen = selector.switch(self.grafting, strategy[rows], age, signals)
                strategy[rows] = chosen
                alpha[rows] = advance_alpha(
                    self.grafting, chosen, age, alpha[rows], signals, settings
                )
                self.send(rows, "alpha")
            self.send(np.arange(self.num_seeds), "columns")
            self._moved()

    def count_errors(self, failed: Tensor, seed_ids: Tensor | None = None) -> None:
        """Add `failed` (rows,), bool or counts, to the error counts of `seed_ids`, on the device.

        By default there is a row per seed; where a seed id is -1, `failed` must be 0.
        """
        with self._latch:
            errors = self.columns[self.ERROR_COUNT]
            counts = failed.to(device=errors.device, dtype=torch.int32)
            if seed_ids is None:
                errors += counts
            else:
                errors.index_add_(0, seed_ids.clamp(min=0), counts)
            self._outdate_errors()

    def errors_counted(self) -> None:
        """Somebody else has added to the error counts on the device."""
        with self._latch:
            self._outdate_errors()

    def _outdate_errors(self) -> None:
        self.outdate("columns")
        self._views.clear()

    def record(self, batch: MetricsBatch) -> NDArray[np.uint8]:
        """Store measured metrics; a column whose valid bit is clear keeps its old value.

        Returns a Refusal code per row; a row with a metric that is not finite changes nothing.
        """
        with self._latch:
            ids, known = self._known(batch.seed_ids)
            measured = batch.valid[:, None] >> np.arange(4, dtype=np.uint8) & 1 == 1
            finite = np.isfinite(batch.metrics) | ~measured
            broken = ~finite.all(axis=1) | np.isinf(batch.score)
            reason = first_failed(_METRIC_CHECKS, (~known, repeated(batch.seed_ids), broken))
            good = reason == 0
            if good.any():
                rows = ids[good]
                self._store(rows, batch.metrics[good], measured[good], batch.score[good])
                self.host("metrics_valid")[rows] |= batch.valid[good]
                self.send(rows, "columns", "metrics", "metrics_valid")
            if not (math.isnan(batch.loss_variance) and math.isnan(batch.accuracy_variance)):
                self.grafting.observed(batch.loss_variance, batch.accuracy_variance)
            self._views.clear()
        return reason

    def give_back(self, seed_ids: NDArray[np.int64], older: Mapping[str, NDArray[Any]]) -> None:
        """Put some columns of seeds back to `older` values, a row for each seed.

        Keys: blueprint_id, grafting_strategy, evaluation_score, performance_metrics (rows, 4),
        metrics_valid.
        """
        with self._latch:
            columns = self.fetch("columns")
            columns[self.BLUEPRINT_ID][seed_ids] = older["blueprint_id"]
            columns[self.GRAFTING_STRATEGY][seed_ids] = older["grafting_strategy"]
            columns[self.EVALUATION_SCORE][seed_ids] = older["evaluation_score"]
            self.host("metrics")[:, seed_ids] = older["performance_metrics"].T
            self.host("metrics_valid")[seed_ids] = older["metrics_valid"]
            self.send(seed_ids, "columns", "metrics", "metrics_valid")
            self._views.clear()

    def _store(
        self,
        rows: NDArray[np.int64],
        values: NDArray[np.float32],
        measured: NDArray[np.bool_],
        score: NDArray[np.float32],
    ) -> None:
        metrics = self.host("metrics")
        metrics[:, rows] = np.where(measured.T, values.T, metrics[:, rows])
        given = ~np.isnan(score)
        fixed = _to_metric_score(score[given])
        self.fetch("columns")[self.EVALUATION_SCORE][rows[given]] = fixed
        self.grafting.measured(rows[given], score[given].astype(np.float64))


def _to_metric_score(score: NDArray[np.float32]) -> NDArray[np.int32]:
    """Fixed point x 1000, rounded half away from zero, saturated to int32."""
    wide = score.astype(np.float64)
    scaled = np.sign(wide) * np.floor(np.abs(wide) * 1000 + 0.5)
    fixed: NDArray[np.int32] = np.clip(scaled, -(2**31), _LARGEST).astype(np.int32)
    return fixed
