"""Folds the event log of a layer back into its seed columns, through their one writer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from esper_ray.errors import CorruptError
from esper_ray.events.log import EventKind, Events
from esper_ray.events.messages import GraftingSignals, MetricsBatch, TransitionBatch
from esper_ray.grafting import GraftingSettings
from esper_ray.lifecycle import Cause, ExtendedLifecycle
from esper_ray.seeds.state_tensor import ExtendedStateTensor

_SIGNALS = tuple(GraftingSignals.__dataclass_fields__)[1:]
_METRICS = ("loss", "accuracy", "stability", "efficiency")


def replay(
    events: Events, layer_id: str, num_seeds: int, settings: GraftingSettings
) -> ExtendedStateTensor:
    """State, history, alpha and generation of a layer after its events, bit for bit.

    `settings` are those of the run. CorruptError where an event does not fit what came before.
    """
    state, epoch = ExtendedStateTensor(num_seeds), -1
    for group in _groups(events.of(layer_id)):
        kinds = set(group.columns["kind"].tolist())
        epoch += EventKind.EPOCH in kinds
        if problem := _fold(state, group, kinds, epoch, settings):
            raise CorruptError(f"the log of {layer_id!r} does not fit at epoch {epoch}: {problem}")
    return state


def _fold(
    state: ExtendedStateTensor,
    group: Events,
    kinds: set[int],
    epoch: int,
    settings: GraftingSettings,
) -> str:
    """Do what one group of events tells; what does not fit, empty where all does."""
    if (others := group.columns["epoch"] != epoch).any():
        return f"an event is of epoch {group.columns['epoch'][others][0]}"
    if EventKind.EPOCH in kinds:
        return _advance(state, group, settings)
    if EventKind.METRICS in kinds:
        state.record(_metrics(group))  # refuses what it refused then
        return ""
    if EventKind.GIVEN_BACK in kinds:
        return _give_back(state, _of(group, EventKind.GIVEN_BACK))
    if kinds & {EventKind.TRANSITION, EventKind.REPLANT}:
        return _move(state, _of(group, EventKind.TRANSITION, EventKind.REPLANT))
    return "" if kinds <= {EventKind.REFUSAL, EventKind.FAULT} else "the end of an epoch is missing"


def _groups(events: Events) -> Iterator[Events]:
    """Events of one sequence number at a time: those were made together."""
    sequence: NDArray[np.uint64] = events.columns["sequence"]
    for rows in np.split(np.arange(len(events)), np.flatnonzero(np.diff(sequence)) + 1):
        if len(rows):
            yield events.take(rows)


def _of(group: Events, *kinds: EventKind) -> Events:
    return group.take(np.isin(group.columns["kind"], kinds))


def _advance(state: ExtendedStateTensor, group: Events, settings: GraftingSettings) -> str:
    seeds = _of(group, EventKind.EPOCH).columns["errors"].tolist()
    if seeds != [state.num_seeds]:
        return f"it is of {seeds} seeds, not {state.num_seeds}"
    failed = _of(group, EventKind.ERRORS).columns
    counts = np.zeros(state.num_seeds, dtype=np.int32)
    known = (failed["seed_id"] >= 0) & (failed["seed_id"] < state.num_seeds)
    counts[failed["seed_id"][known]] = failed["errors"][known]
    read = _of(group, EventKind.SIGNALS).columns
    measures = {name: read[name] for name in _SIGNALS}
    try:
        state.count_errors(torch.from_numpy(counts))
        state.advance(GraftingSignals(read["seed_id"].astype(np.int64), **measures), settings)
    except ValueError as error:
        return str(error)
    return "" if known.all() else "errors of a seed that does not exist"


def _move(state: ExtendedStateTensor, moves: Events) -> str:
    if unknown := set(moves.columns["cause"]) - set(Cause.__members__):
        return f"no cause is named {min(unknown)!r}"
    applied, _ = state.compare_and_set(_transitions(moves.columns))
    lost = moves.columns["seed_id"][~applied].tolist()
    return f"seeds {lost} cannot have moved" if lost else ""


def _give_back(state: ExtendedStateTensor, given: Events) -> str:
    columns = given.columns
    ids = columns["seed_id"].astype(np.int64)
    known = (ids >= 0) & (ids < state.num_seeds)
    if not known.all() or (state.rows(ids).state != ExtendedLifecycle.ROLLED_BACK).any():
        return f"seeds {ids.tolist()} are not in ROLLED_BACK"
    older = {
        "blueprint_id": columns["blueprint_id"],
        "grafting_strategy": columns["strategy"].astype(np.int32),
        "evaluation_score": np.rint(columns["performance_delta"] * 1000).astype(np.int32),
        "performance_metrics": np.stack([columns[name] for name in _METRICS], axis=1),
        "metrics_valid": columns["valid"],
    }
    state.give_back(ids, older)
    return ""


def _metrics(group: Events) -> MetricsBatch:
    columns = _of(group, EventKind.METRICS).columns
    return MetricsBatch(
        layer_id="",
        seed_ids=columns["seed_id"].astype(np.int64),
        metrics=np.stack([columns[name] for name in _METRICS], axis=1),
        valid=columns["valid"],
        score=columns["score"],
    )


def _transitions(columns: Mapping[str, Any]) -> TransitionBatch:
    return TransitionBatch(
        layer_id="",
        number=0,
        epoch=int(columns["epoch"][0]),
        seed_ids=columns["seed_id"].astype(np.int64),
        expected_state=columns["from_state"].astype(np.int32),
        expected_generation=columns["generation"].astype(np.int16),
        target=columns["to_state"].astype(np.int32),
        cause=np.array([Cause[name] for name in columns["cause"]], dtype=np.int32),
        blueprint_id=columns["blueprint_id"],
        strategy=columns["strategy"].astype(np.int32),
        checkpoint_id=columns["checkpoint_id"],
    )
