"""A layer's rows written one by one in plain Python, to compare the vectorised writer with."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from esper_ray.events import GraftingSignals, MetricsBatch, TransitionBatch
from esper_ray.grafting import STRATEGIES, GraftingSettings, GraftingStrategyBase
from esper_ray.lifecycle import TERMINAL_STATES, Cause, Refusal, StateTransition
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.seeds import ExtendedStateTensor
from tests.seeds.histories import MEASURES, Mode, history_of

LAST = 2**15 - 1
FREED = (S.DORMANT, S.CULLED, S.CANCELLED)
RENEWABLE = (S.CULLED, S.CANCELLED, S.ROLLED_BACK)


@dataclass
class Row:
    """One seed."""

    state: int = 0
    blueprint: int = -1
    epochs: int = 0
    strategy: int = 0
    parent: int = -1
    checkpoint: int = -1
    score: int = 0
    errors: int = 0
    generation: int = 0
    alpha: float = 0.0
    metrics: list[float] = field(default_factory=lambda: [0.0] * 4)
    valid: int = 0
    history: list[tuple[int, int]] = field(default_factory=list)
    """Every entry ever made, oldest first."""
    rule: GraftingStrategyBase | None = None
    """Moves alpha while in GRAFTING."""

    def columns(self) -> list[int]:
        """The eight columns of the state tensor."""
        return [
            self.state,
            self.blueprint,
            self.epochs,
            self.strategy,
            self.parent,
            self.checkpoint,
            self.score,
            self.errors,
        ]


class SlowLayer:
    """What `ExtendedStateTensor` promises, row by row."""

    def __init__(self, rows: list[Row], settings: GraftingSettings) -> None:
        self.rows, self.settings = rows, settings

    def compare_and_set(self, batch: TransitionBatch, mode: Mode) -> list[int]:
        """Reason of every row."""
        asked = range(len(batch.seed_ids))
        repeats = Counter(batch.seed_ids.tolist())
        reasons = [int(self._refusal(batch, i, repeats)) for i in asked]
        if mode == "all" and any(reasons):
            reasons = [reason or Refusal.BATCH_REFUSED for reason in reasons]
        for i in asked:
            if not reasons[i]:
                self._write(batch, i)
        return reasons

    def _refusal(self, batch: TransitionBatch, i: int, repeats: Counter[int]) -> Refusal:
        seed_id, target, strategy = (
            int(column[i]) for column in (batch.seed_ids, batch.target, batch.strategy)
        )
        if not 0 <= seed_id < len(self.rows):
            return Refusal.UNKNOWN_SEED
        row = self.rows[seed_id]
        anew = target == S.DORMANT and batch.cause[i] == Cause.REPLANT
        if repeats[seed_id] > 1:
            return Refusal.DUPLICATE_SEED
        if row.generation != batch.expected_generation[i]:
            return Refusal.STALE_GENERATION
        if row.state != batch.expected_state[i]:
            return Refusal.STALE_STATE
        if target not in list(S):
            return Refusal.UNKNOWN_STATE
        if row.state in TERMINAL_STATES and not anew:
            return Refusal.TERMINAL
        ways = StateTransition.VALID_TRANSITIONS[S(row.state)]
        if row.state not in RENEWABLE if anew else target not in ways:
            return Refusal.NOT_IN_TABLE
        if anew and row.generation == LAST:
            return Refusal.GENERATIONS_USED_UP
        if strategy != -1 and strategy not in STRATEGIES:
            return Refusal.UNKNOWN_STRATEGY
        if batch.cause[i] not in list(Cause):
            return Refusal.UNKNOWN_CAUSE
        bare = _given(batch.blueprint_id[i], row.blueprint) < 0
        needs = S.TRAINING <= target <= S.FOSSILIZED
        return Refusal.NO_BLUEPRINT if needs and bare else Refusal.NONE

    def _write(self, batch: TransitionBatch, i: int) -> None:
        old, target = self.rows[batch.seed_ids[i]], int(batch.target[i])
        entry = (old.state | target << 8 | int(batch.cause[i]) << 16, batch.epoch)
        history = [*old.history, entry]
        if target == S.DORMANT:
            self.rows[batch.seed_ids[i]] = Row(generation=old.generation + 1, history=history)
            return
        old.history, old.parent, old.state, old.epochs = history, old.state, target, 0
        old.blueprint = _given(batch.blueprint_id[i], old.blueprint)
        old.blueprint = -1 if target in FREED else old.blueprint
        old.strategy = _given(batch.strategy[i], old.strategy)
        old.checkpoint = _given(batch.checkpoint_id[i], old.checkpoint)
        old.alpha = 1.0 if S.STABILIZATION <= target <= S.FOSSILIZED else 0.0
        old.rule = STRATEGIES[old.strategy](self.settings) if target == S.GRAFTING else None

    def advance(self, signals: GraftingSignals) -> None:
        """One epoch."""
        for row in self.rows:
            if row.state not in TERMINAL_STATES:
                row.epochs = min(row.epochs + 1, 2**31 - 1)
        for i, seed_id in enumerate(signals.seed_ids.tolist()):
            row = self.rows[seed_id]
            read = {name: float(getattr(signals, name)[i]) for name in MEASURES}
            assert row.rule is not None
            alpha = row.rule.compute_alpha(
                row.epochs, self.settings.ramp_epochs, {**read, "current_alpha": row.alpha}
            )
            row.alpha = float(np.float32(alpha))

    def count_errors(self, errors: tuple[int, ...]) -> None:
        """Add to every row."""
        for row, count in zip(self.rows, errors, strict=True):
            row.errors += count

    def record(self, batch: MetricsBatch) -> list[int]:
        """Reason of every row."""
        repeats = Counter(batch.seed_ids.tolist())
        return [int(self._record(batch, i, repeats)) for i in range(len(batch.seed_ids))]

    def _record(self, batch: MetricsBatch, i: int, repeats: Counter[int]) -> Refusal:
        seed_id, valid, score = int(batch.seed_ids[i]), int(batch.valid[i]), float(batch.score[i])
        if not 0 <= seed_id < len(self.rows):
            return Refusal.UNKNOWN_SEED
        if repeats[seed_id] > 1:
            return Refusal.DUPLICATE_SEED
        measured = {bit: float(batch.metrics[i, bit]) for bit in range(4) if valid >> bit & 1}
        if math.isinf(score) or not all(map(math.isfinite, measured.values())):
            return Refusal.NOT_FINITE
        row = self.rows[seed_id]
        for bit, value in measured.items():
            row.metrics[bit] = value
        row.valid |= valid
        row.score = row.score if math.isnan(score) else fixed_point(score)
        return Refusal.NONE


def fixed_point(score: float) -> int:
    """A score x 1000, rounded half away from zero, within int32."""
    size = math.floor(abs(score) * 1000 + 0.5)
    return max(-(2**31), min(2**31 - 1, size if score > 0 else -size))


def _given(value: np.int32, old: int) -> int:
    return int(value) if value >= 0 else old


def picture(layer: SlowLayer | ExtendedStateTensor) -> dict[str, Any]:
    """Everything that both keep, in plain Python."""
    if isinstance(layer, SlowLayer):
        rows = layer.rows
        return {
            "columns": [row.columns() for row in rows],
            "history": [row.history[-10:] for row in rows],
            "alpha": [row.alpha for row in rows],
            "generation": [row.generation for row in rows],
            "metrics": [row.metrics for row in rows],
            "valid": [row.valid for row in rows],
            "grafting": [i for i, row in enumerate(rows) if row.state == S.GRAFTING],
        }
    return {
        "columns": layer.state_tensor.tolist(),
        "history": [history_of(layer, i) for i in range(layer.num_seeds)],
        "alpha": layer.alpha.tolist(),
        "generation": layer.generation.tolist(),
        "metrics": layer.performance_metrics.tolist(),
        "valid": layer.metrics_valid.tolist(),
        "grafting": layer.grafting.seed_ids.tolist(),
    }
