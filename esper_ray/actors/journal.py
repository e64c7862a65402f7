"""Turns what a coordinator did into events, and keeps them until the next commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from esper_ray.events.gate import gate_json
from esper_ray.events.log import EventKind, Events
from esper_ray.events.messages import MetricsBatch, TelemetryBatch, TransitionBatch
from esper_ray.lifecycle import BLENDED_STATES, REASONS, Cause, Decisions, Explanation, Refusal

_MOST_TEXT = 200
_SIGNALS = ("weight_drift", "performance_delta", "loss_variance", "gradient_norm")


@dataclass(frozen=True, slots=True)
class News:
    """Events that a journal has got since it was last asked; all that it has if `anew`."""

    sequence: int
    parts: Sequence[Events]
    anew: bool

    def after(self, older: News) -> News:
        """All of both, of one journal."""
        return News(self.sequence, [*older.parts, *self.parts], older.anew)


class Journal:
    """Events since the last commit; things done together share a sequence number."""

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence
        self._parts: list[Events] = []
        self._told = 0

    def epoch(self, telemetry: TelemetryBatch, step: int) -> None:
        """A lifecycle epoch of a layer: errors counted, signals read, seeds one epoch older."""
        where = self._next(telemetry.layer_id, telemetry.epoch, step)
        failed, signals = np.flatnonzero(telemetry.errors), telemetry.signals
        self._add(EventKind.ERRORS, where, failed, errors=telemetry.errors[failed])
        self._add(
            EventKind.SIGNALS,
            where,
            signals.seed_ids,
            alpha=telemetry.alpha[signals.seed_ids],
            accuracy_variance=signals.accuracy_variance,
            **{name: getattr(signals, name) for name in _SIGNALS},
        )
        self._add(EventKind.EPOCH, where, np.array([-1]), errors=len(telemetry.state))

    def metrics(self, batch: MetricsBatch, epoch: int, step: int) -> None:
        """Metrics that a layer was told to record."""
        loss, accuracy, stability, efficiency = batch.metrics.T
        self._add(
            EventKind.METRICS,
            self._next(batch.layer_id, epoch, step),
            batch.seed_ids,
            score=batch.score,
            loss=loss,
            accuracy=accuracy,
            stability=stability,
            efficiency=efficiency,
            valid=batch.valid,
        )

    def moves(self, batch: TransitionBatch, decisions: Decisions, step: int) -> None:
        """Applied rows of a batch, with the decision behind each."""
        score = decisions.requests.metrics.get(
            "performance_delta", np.full(len(batch.target), np.nan)
        )
        where = self._next(batch.layer_id, batch.epoch, step)
        for kind, rows in (
            (EventKind.TRANSITION, np.flatnonzero(~batch.replants)),
            (EventKind.REPLANT, np.flatnonzero(batch.replants)),
        ):
            some = batch.take(rows)
            self._add(
                kind,
                where,
                some.seed_ids,
                generation=some.expected_generation,
                from_state=some.expected_state,
                to_state=some.target,
                cause=[Cause(code).name for code in some.cause.tolist()],
                strategy=some.strategy,
                blueprint_id=some.blueprint_id,
                checkpoint_id=some.checkpoint_id,
                alpha=np.isin(some.target, list(BLENDED_STATES)).astype(np.float32),
                score=score[rows],
                gate=[_gate(told) for told in decisions.take(rows).explanations()],
            )

    def refusals(self, decisions: Decisions, epoch: int, step: int) -> None:
        """The rows of `decisions` that were refused."""
        refused = decisions.take(np.flatnonzero(decisions.reason != Refusal.NONE))
        asked = refused.requests
        if len(asked) == 0:
            return
        self._add(
            EventKind.REFUSAL,
            self._next(asked.layer_id, epoch, step),
            asked.seed_ids,
            generation=asked.generation,
            from_state=asked.source,
            to_state=asked.target,
            cause=[Cause(code).name for code in asked.cause.tolist()],
            gate=[_gate(told) for told in refused.explanations()],
        )

    def fault(self, cause: str, about: str) -> None:
        """Something went wrong and was dealt with, as `cause` says: REWOUND, REPLACED."""
        where, gate = self._next("", -1, -1), gate_json("", {}, {}, about[:_MOST_TEXT])
        self._add(EventKind.FAULT, where, np.array([-1]), cause=cause, gate=gate)

    def news(self) -> News:
        """What it has got since this was last asked."""
        news = News(self.sequence, self._parts[self._told :], self._told == 0)
        self._told = len(self._parts)
        return news

    def take_over(self, news: News) -> None:
        """Hold what another journal held."""
        self.sequence, self._parts, self._told = news.sequence, [*news.parts], 0

    def drain(self) -> Events:
        """All events so far; the journal is empty afterwards."""
        events, self._parts, self._told = Events.concatenate(self._parts), [], 0
        return events

    def _next(self, layer_id: str, epoch: int, step: int) -> tuple[str, int, int, int]:
        self.sequence += 1
        return layer_id, self.sequence, epoch, step

    def _add(
        self,
        kind: EventKind,
        where: tuple[str, int, int, int],
        seed_ids: np.ndarray[tuple[int], np.dtype[np.int64]],
        **given: Any,
    ) -> None:
        if len(seed_ids):
            self._parts.append(
                Events.build(kind, *where, rows=len(seed_ids), seed_id=seed_ids, **given)
            )


def _gate(told: Explanation) -> str:
    if not told.gate and told.verdict == REASONS[Refusal.NONE]:
        return ""
    return gate_json(told.gate, told.inputs, told.thresholds, told.verdict)
