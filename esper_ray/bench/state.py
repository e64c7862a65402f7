"""`bench state`: transitions, alphas, memory and concurrency of the seed columns, on the CPU.

Every timed row is set against the same work on Python objects, one seed at a time, in the same run.
"""

from __future__ import annotations

import copy
import gc
import statistics
import threading
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from esper_ray.bench.memory import memory_rows
from esper_ray.bench.plain_seeds import PlainSeed, plain_strategy
from esper_ray.bench.rows import Row, make_row
from esper_ray.events.messages import GraftingSignals, TransitionBatch
from esper_ray.grafting import STRATEGIES, GraftingSettings
from esper_ray.lifecycle import MINIMUM_EPOCHS, ExtendedLifecycle, LifecycleManager, Requests
from esper_ray.policy import PolicySettings, transition_batch
from esper_ray.seeds import ExtendedStateTensor

_S = ExtendedLifecycle
_ROAD = tuple(_S)[:8]
_MANAGER = LifecycleManager(minimum_epochs=dict.fromkeys(MINIMUM_EPOCHS, 0))
_SETTINGS, _POLICY = GraftingSettings(), PolicySettings()
_MEASURED = {
    "local_loss": 0.1,
    "delta_ratio": 0.1,
    "alpha_one_loss_ratio": 1.0,
    "alpha": 1.0,
    "performance_delta": 0.1,
    "performance_delta_low": 0.05,
    "total_improvement": 0.1,
    "total_improvement_low": 0.05,
    "stability_score": 0.99,
    "final_stability": 0.99,
}
"""What opens every gate."""
_SIGNALS = {
    "weight_drift": 0.004,
    "performance_delta": 0.02,
    "loss_variance": 0.01,
    "gradient_norm": 1.0,
    "accuracy_variance": 0.01,
}
_SEEDS, _MANY = 10_000, 1_000_000


def measure() -> list[Row]:
    """Every row; about a minute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.disable()  # as timeit does: a collection of the loop's objects would fall on either side
    try:
        return [*_transitions(), *_alphas(), *memory_rows(_SEEDS), *_scaling(), *_concurrent()]
    finally:
        gc.enable()
        torch.set_num_threads(threads)


# ---- transitions ---------------------------------------------------------------------------------


def _on_the_road(count: int) -> ExtendedStateTensor:
    """Seeds spread evenly over the seven states that a transition leads out of."""
    state, ids = ExtendedStateTensor(count), np.arange(count, dtype=np.int64)
    for place, target in enumerate(_ROAD[1:-1], start=1):
        _move(state, ids[ids % 7 >= place], target)
    return state


def _targets(ids: NDArray[np.int64]) -> NDArray[np.int32]:
    return (ids % 7 + 1).astype(np.int32)


def _request(
    state: ExtendedStateTensor,
    ids: NDArray[np.int64],
    target: NDArray[np.int32],
    metrics: dict[str, NDArray[np.float64]],
) -> TransitionBatch:
    """Read the rows, judge, and make the batch of what was accepted."""
    view, rows = state.rows(ids), len(ids)
    requests = Requests(
        layer_id="layer",
        seed_ids=ids,
        generation=view.generation,
        source=view.state,
        target=target,
        cause=np.zeros(rows, dtype=np.int32),
        epochs_in_state=view.epochs_in_state,
        error_count=view.error_count,
        metrics=metrics,
    )
    decisions = _MANAGER.judge(requests)
    batch = transition_batch(decisions, _POLICY, number=1, epoch=3, checkpoint_id=1)
    return batch.take(decisions.accepted) if np.count_nonzero(decisions.reason) else batch


def _move(state: ExtendedStateTensor, ids: NDArray[np.int64], target: int) -> None:
    targets = np.full(len(ids), target, dtype=np.int32)
    state.compare_and_set(_request(state, ids, targets, _metrics(len(ids))))


def _metrics(rows: int) -> dict[str, NDArray[np.float64]]:
    return {name: np.full(rows, value) for name, value in _MEASURED.items()}


def _batch_seconds(ready: ExtendedStateTensor, count: int) -> float:
    """Validate and apply one move of `count` seeds, with history, then one epoch of the layer."""
    state, ids = copy.deepcopy(ready), np.arange(count, dtype=np.int64)
    metrics, targets = _metrics(count), _targets(ids)
    began = time.perf_counter()
    applied, _ = state.compare_and_set(_request(state, ids, targets, metrics))
    signals = _signals(state.grafting.seed_ids)
    state.advance(signals, _SETTINGS)
    seconds = time.perf_counter() - began
    if not applied.all():
        raise RuntimeError("a move of the bench was refused")
    return seconds


def _single_seconds(ready: ExtendedStateTensor) -> float:
    """Median of one request each for 700 seeds of all states."""
    state, metrics = copy.deepcopy(ready), _metrics(1)
    ids = np.arange(_SEEDS, dtype=np.int64)
    targets = _targets(ids)
    times = []
    for place in range(700):
        own = slice(place, place + 1)
        began = time.perf_counter()
        state.compare_and_set(_request(state, ids[own], targets[own], metrics))
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _plain_seeds(count: int) -> list[PlainSeed]:
    seeds = [PlainSeed() for _ in range(count)]
    for number, seed in enumerate(seeds):
        seed.strategy = plain_strategy(number % len(STRATEGIES))
        for target in _ROAD[1 : number % 7 + 1]:
            seed.move(target, _MEASURED, 0)
    return seeds


def _plain_seconds(count: int) -> float:
    seeds = _plain_seeds(count)
    began = time.perf_counter()
    for number, seed in enumerate(seeds):
        seed.move(_ROAD[number % 7 + 1], _MEASURED, 3)
    for seed in seeds:
        seed.advance(_SIGNALS, _SETTINGS.ramp_epochs)
    return time.perf_counter() - began


def _transitions() -> list[Row]:
    ready = _on_the_road(_SEEDS)
    single = _interleaved(lambda: _single_seconds(ready), lambda: _plain_seconds(7) / 7, 7)
    batch = _interleaved(lambda: _batch_seconds(ready, _SEEDS), lambda: _plain_seconds(_SEEDS), 31)
    return [
        _timed("one transition", single, 0.1),
        _timed("10,000 transitions in one batch, and an epoch", batch, 2.0),
    ]


# ---- alphas --------------------------------------------------------------------------------------


def _signals(ids: NDArray[np.int32]) -> GraftingSignals:
    measures = {name: np.full(len(ids), value) for name, value in _SIGNALS.items()}
    return GraftingSignals(ids.astype(np.int64), **measures)


def _grafting(share: float) -> ExtendedStateTensor:
    """10,000 seeds, a share of them in GRAFTING, over all strategies in turn."""
    state, ids = ExtendedStateTensor(_SEEDS), np.arange(_SEEDS, dtype=np.int64)
    chosen = ids[: int(share * _SEEDS)]
    for target in _ROAD[1:4]:
        _move(state, chosen, target)
    state.columns[state.GRAFTING_STRATEGY] = torch.from_numpy(ids % len(STRATEGIES)).int()
    return state


def _alphas() -> list[Row]:
    rows = []
    for share, target in ((0.1, 0.5), (1.0, 0.7)):
        ready = _grafting(share)
        signals = _signals(ready.grafting.seed_ids)
        plain = [PlainSeed(_S.GRAFTING, strategy=plain_strategy(i % 5)) for i in range(_SEEDS)]

        def ours(ready: ExtendedStateTensor = ready, signals: GraftingSignals = signals) -> float:
            began = time.perf_counter()
            ready.advance(signals, _SETTINGS)
            return time.perf_counter() - began

        def loop(seeds: list[PlainSeed] = plain[: int(share * _SEEDS)]) -> float:
            began = time.perf_counter()
            for seed in seeds:
                seed.advance(_SIGNALS, _SETTINGS.ramp_epochs)
            return time.perf_counter() - began

        name = f"an epoch of alphas, five strategies, {share:.0%} of 10,000 grafting"
        rows.append(_timed(name, _interleaved(ours, loop, 61), target))
    return rows


# ---- scaling and concurrency ---------------------------------------------------------------------


def _scaling() -> list[Row]:
    few, many = _on_the_road(_SEEDS), _on_the_road(_MANY)
    times = _interleaved(
        lambda: _batch_seconds(many, _MANY) / _MANY, lambda: _batch_seconds(few, _SEEDS) / _SEEDS, 5
    )
    return [
        make_row("cost per seed at 10,000", times[1] * 1e9, "ns"),
        make_row("cost per seed at 1,000,000", times[0] * 1e9, "ns"),
        make_row("1,000,000 / 10,000", times[0] / times[1], "ratio", 1.5),
    ]


def _concurrent(threads: int = 8, requests: int = 1_000) -> list[Row]:
    state, metrics = copy.deepcopy(_on_the_road(_SEEDS)), _metrics(1)
    ids = np.arange(requests, dtype=np.int64)
    targets, times = _targets(ids), np.zeros(requests)

    def work(first: int) -> None:
        for place in range(first, requests, threads):
            own = slice(place, place + 1)
            began = time.perf_counter()
            state.compare_and_set(_request(state, ids[own], targets[own], metrics))
            times[place] = time.perf_counter() - began

    workers = [threading.Thread(target=work, args=(first,)) for first in range(threads)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    took = time.perf_counter() - began
    return [
        make_row("1,000 single requests from 8 threads", requests / took, "requests/s"),
        make_row("the same, p99", float(np.quantile(times, 0.99)) * 1e3, "ms"),
    ]


def _interleaved(
    ours: Callable[[], float], other: Callable[[], float], repeats: int
) -> tuple[float, float]:
    """Medians of two measurements taken in turn: five of ours in a row, then one of the loop.

    The first of the five finds the loop's objects in the caches and counts like the others.
    """
    ours(), other()
    turns = [([ours() for _ in range(5)], other()) for _ in range(repeats)]
    mine = statistics.median(seconds for five, _ in turns for seconds in five)
    return mine, statistics.median(loop for _, loop in turns)


def _timed(name: str, seconds: tuple[float, float], target: float) -> Row:
    ours, loop = seconds
    return {**make_row(name, ours * 1e3, "ms", target), "loop_ratio": round(loop / ours, 3)}
