"""The tick of 10,000 seeds on a CUDA device: judge, move, history, epochs and five alphas."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from esper_ray.bench.pairs import cuda_seconds
from esper_ray.bench.rows import Row, make_row
from esper_ray.events.messages import GraftingSignals, TransitionBatch
from esper_ray.grafting import STRATEGIES, GraftingSettings
from esper_ray.lifecycle import ExtendedLifecycle
from esper_ray.seeds import ExtendedStateTensor
from esper_ray.seeds.device_tick import DeviceTick

SEEDS: Final = 10_000
_EAGER_US, _GRAPH_US = 40.0, 8.0
_EAGER, _GRAPH = 100, 20  # ticks between two events
_S = ExtendedLifecycle
_ROAD: Final = (_S.GERMINATED, _S.TRAINING, _S.GRAFTING, _S.STABILIZATION, _S.EVALUATING)


def tick_rows(
    captured: Callable[[Callable[[], None]], Callable[[], None]], pairs: int
) -> list[Row]:
    """Microseconds of a tick, begun by Python each time and within a CUDA graph.

    Eager is many launches in a row over their number, of which the first finds moves to make: what
    it costs the host to begin one counts. In a graph the inputs are laid out anew before each
    tick, and the time of the same graph without ticks is taken off; half of the seeds move, the
    other half are in GRAFTING.
    """
    ticks, batch = ready("cuda")
    tick, columns = ticks.tick, ticks.state.columns
    kept = [(tensor, tensor.clone()) for tensor in (columns, tick.asked)]

    def lay_out() -> None:
        for tensor, was in kept:
            tensor.copy_(was)

    def eager() -> None:
        for _ in range(_EAGER):
            tick()

    def bare() -> None:
        for _ in range(_GRAPH):
            lay_out()

    def full() -> None:
        for _ in range(_GRAPH):
            lay_out()
            tick()

    full()
    if ticks.reasons(batch).any():
        raise RuntimeError("a move of the bench was refused")
    without, with_ticks = captured(bare), captured(full)
    for call in (eager, without, with_ticks):
        cuda_seconds(call)
    begun = [cuda_seconds(eager) for _ in range(pairs)]
    added = [cuda_seconds(with_ticks) - cuda_seconds(without) for _ in range(pairs)]
    return [
        _row("eager", begun, _EAGER, _EAGER_US),
        _row("graph", added, _GRAPH, _GRAPH_US),
    ]


def _row(name: str, seconds: list[float], ticks: int, target: float) -> Row:
    value = statistics.median(seconds) * 1e6 / ticks
    return make_row(f"cuda/tick/{SEEDS}/{name}", value, "us", target)


def ready(device: str, seeds: int = SEEDS) -> tuple[DeviceTick, TransitionBatch]:
    """Every second seed in GRAFTING, by five strategies, the others asked to move on."""
    state, ids = ExtendedStateTensor(seeds), np.arange(seeds, dtype=np.int64)
    goal = np.where(ids % 2, _S.GRAFTING, ids // 2 % len(_ROAD)).astype(np.int32)
    for source, target in enumerate(_ROAD):
        going = ids[goal > source]
        state.compare_and_set(_moves(going, source, int(target)))
    state.columns[state.GRAFTING_STRATEGY] = torch.from_numpy(ids // 2 % len(STRATEGIES)).int()
    state.changed()
    rows = state.grafting.seed_ids.astype(np.int64)
    ticks = DeviceTick(state.to(device), GraftingSettings())
    [asking] = np.nonzero(ids % 2 == 0)
    batch = _moves(asking, goal[asking], goal[asking] + 1)
    ticks.ask(batch)
    measures = np.random.default_rng(0).random((5, len(rows))) * 0.03
    ticks.sense(GraftingSignals(rows, *measures))
    return ticks, batch


def _moves(
    ids: NDArray[np.int64], source: NDArray[np.int32] | int, target: NDArray[np.int32] | int
) -> TransitionBatch:
    def column(value: NDArray[np.int32] | int) -> NDArray[np.int32]:
        return np.broadcast_to(np.asarray(value, np.int32), len(ids)).copy()

    generation, own = np.zeros(len(ids), np.int16), column(-1)
    return TransitionBatch(
        "layer",
        1,
        3,
        ids,
        column(source),
        generation,
        column(target),
        column(0),
        column(0),
        own,
        own,
    )
