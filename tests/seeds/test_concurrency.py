"""Many threads ask for random moves of one layer's seeds while epochs advance."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray

from esper_ray.events import GraftingSignals, MetricsBatch, TransitionBatch
from esper_ray.grafting import GraftingSettings
from esper_ray.lifecycle import (
    BLENDED_STATES,
    TERMINAL_STATES,
    Cause,
    LifecycleManager,
    Refusal,
    Requests,
    StateTransition,
)
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.seeds import ExtendedStateTensor, SeedView
from tests.seeds.histories import same_state

THREADS: Final = 8
RULES: Final = GraftingSettings(ramp_epochs=2, pause_epochs=1, check_every=2)
MANAGER: Final = LifecycleManager(
    minimum_epochs=dict.fromkeys((S.TRAINING, S.GRAFTING, S.EVALUATING), 1), replanting=True
)
EDGES: Final = {(s, t) for s, ways in StateTransition.VALID_TRANSITIONS.items() for t in ways}
REPLANTS: Final = {(s, S.DORMANT) for s in TERMINAL_STATES - {S.FOSSILIZED}}


def ways_out(state: S) -> list[S]:
    """Eight ways, the main road five times; only a new generation leads out of an end."""
    first, *rest = StateTransition.VALID_TRANSITIONS[state] or (S.DORMANT,)
    return [first] * 5 + np.resize(rest or [first], 3).tolist()


WAYS: Final = np.array([ways_out(state) for state in S], dtype=np.int32)
ENDED: Final = np.isin(np.arange(len(S)), list(TERMINAL_STATES))
BLENDED: Final = np.isin(np.arange(len(S)), list(BLENDED_STATES))
Entry = TransitionBatch | MetricsBatch | GraftingSignals


class RecordedStateTensor(ExtendedStateTensor):
    """Keeps what changed it, in the order in which it was written."""

    def __init__(self, num_seeds: int) -> None:
        super().__init__(num_seeds)
        self.log: list[Entry] = []
        self._epoch: GraftingSignals | None = None

    def _commit(self, batch: TransitionBatch) -> None:
        super()._commit(batch)
        self.log.append(batch)

    def _store(self, rows: Any, values: Any, measured: Any, score: Any) -> None:
        super()._store(rows, values, measured, score)
        valid = np.packbits(measured, axis=1, bitorder="little")[:, 0]
        self.log.append(MetricsBatch("layer", rows, values, valid, score))

    def advance(self, signals: GraftingSignals, settings: GraftingSettings) -> None:
        self._epoch = signals  # one thread advances
        super().advance(signals, settings)

    def send(self, rows: NDArray[np.int64], *names: str) -> None:
        if names == ("columns",) and self._epoch is not None:  # an epoch sends these last
            self.log.append(self._epoch)
            self._epoch = None
        super().send(rows, *names)


@dataclass(frozen=True)
class Load:
    """How much is asked of the layer, and what must have been seen at the end."""

    batches: int
    seeds: int
    edges: int
    epochs: int


@contextmanager
def frequent_switches() -> Iterator[None]:
    """Threads take turns far more often than usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(2e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def check_rows(view: SeedView) -> None:
    """No row is ever seen half written."""
    assert (view.alpha[BLENDED[view.state]] == 1.0).all()
    idle = ~BLENDED[view.state] & (view.state != S.GRAFTING)
    assert not view.alpha[idle].any()
    assert not view.epochs_in_state[ENDED[view.state]].any()


def ask(draw: np.random.Generator, ids: NDArray[np.int64], view: SeedView) -> Requests:
    """Random moves, most of them in the table, with metrics that open gates every other time."""
    count = len(ids)
    target = WAYS[view.state, draw.integers(8, size=count)]
    odd = draw.random(count) < 0.25
    target[odd] = draw.integers(-1, len(S) + 1, size=odd.sum())
    cause = np.where(ENDED[view.state], Cause.REPLANT, draw.integers(4, size=count))

    def number(low: float, high: float) -> NDArray[np.float64]:
        return draw.uniform(low, high, count)

    return Requests(
        layer_id="layer",
        seed_ids=ids,
        generation=view.generation,
        source=view.state,
        target=target,
        cause=cause.astype(np.int32),
        epochs_in_state=view.epochs_in_state,
        error_count=view.error_count,
        metrics={
            "alpha": view.alpha.astype(np.float64),
            "local_loss": number(0, 1),
            "delta_ratio": number(0, 0.7),
            "alpha_one_loss_ratio": number(0.9, 1.05),
            "performance_delta": number(-0.1, 0.1),
            "stability_score": number(0.7, 1),
            "error_rate": number(0, 0.15),
            "total_improvement": number(-0.002, 0.01),
            "final_stability": number(0.9, 1),
        },
    )


def batch_of(draw: np.random.Generator, asked: Requests, epoch: int) -> TransitionBatch:
    count = len(asked)
    born, keep = asked.target == S.GERMINATED, np.full(count, -1, dtype=np.int32)
    return TransitionBatch(
        layer_id="layer",
        number=0,
        epoch=epoch,
        seed_ids=asked.seed_ids,
        expected_state=asked.source,
        expected_generation=asked.generation,
        target=asked.target,
        cause=asked.cause,
        blueprint_id=np.where(born, draw.integers(4, size=count), keep).astype(np.int32),
        strategy=np.where(born, draw.integers(5, size=count), keep).astype(np.int32),
        checkpoint_id=np.where(asked.target == S.GRAFTING, epoch, keep).astype(np.int32),
    )


def agent(state: ExtendedStateTensor, number: int, batches: int) -> Counter[str]:
    """One thread: look, judge, apply; now and then record metrics."""
    draw, counts = np.random.default_rng([7, number]), Counter[str]()
    for epoch in range(batches):
        ids = draw.integers(state.num_seeds, size=draw.integers(1, 16))
        view = state.rows(ids)
        check_rows(view)
        decided = MANAGER.judge(ask(draw, ids, view))
        asked = decided.requests.take(decided.accepted)
        applied, reason = state.compare_and_set(batch_of(draw, asked, epoch))
        counts["asked"] += len(ids)
        counts["refused by the manager"] += int((~decided.accepted).sum())
        counts["accepted"] += int(applied.sum())
        counts["repeated"] += int((reason == Refusal.DUPLICATE_SEED).sum())
        stale = (Refusal.STALE_STATE, Refusal.STALE_GENERATION)
        counts["overtaken"] += int(np.isin(reason, stale).sum())
        assert applied.sum() == (reason == Refusal.NONE).sum()
        if epoch % 8 == 0:
            values = draw.normal(size=(len(ids), 4)).astype(np.float32)
            valid = draw.integers(16, size=len(ids)).astype(np.uint8)
            state.record(MetricsBatch("layer", ids, values, valid, values[:, 0]))
    return counts


def clock(state: ExtendedStateTensor, done: threading.Event) -> Counter[str]:
    """The thread that ends epochs, until all agents are done."""
    draw, counts = np.random.default_rng(11), Counter[str]()
    while not done.wait(1e-3):
        ids = state.view().rows(S.GRAFTING)
        measures = draw.uniform(0, 0.02, (5, len(ids)))
        try:
            state.advance(GraftingSignals(ids, *measures), RULES)
        except ValueError:
            counts["epochs begun anew"] += 1  # a seed entered or left GRAFTING in between
        else:
            counts["epochs"] += 1
    return counts


def run(state: ExtendedStateTensor, batches: int) -> Counter[str]:
    done = threading.Event()
    with frequent_switches(), ThreadPoolExecutor(THREADS + 1) as pool:
        ticking = pool.submit(clock, state, done)
        try:
            agents = [pool.submit(agent, state, i, batches) for i in range(THREADS)]
            counts = [one.result() for one in agents]
        finally:
            done.set()
        return sum(counts, ticking.result())


def replay(num_seeds: int, log: list[Entry]) -> ExtendedStateTensor:
    """The same in one thread."""
    state = ExtendedStateTensor(num_seeds)
    for entry in log:
        match entry:
            case TransitionBatch():
                assert state.compare_and_set(entry, mode="all")[0].all()
            case MetricsBatch():
                assert not state.record(entry).any()
            case GraftingSignals():
                state.advance(entry, RULES)
    return state


def edges_of(log: list[Entry]) -> Counter[tuple[S, S]]:
    edges = Counter[tuple[S, S]]()
    for entry in log:
        if isinstance(entry, TransitionBatch):
            pairs = zip(entry.expected_state.tolist(), entry.target.tolist(), strict=True)
            edges.update((S(source), S(target)) for source, target in pairs)
    return edges


def told(counts: Counter[str], edges: Counter[tuple[S, S]], seconds: float) -> str:
    lines = [f"{name}: {number:,}" for name, number in counts.items()]
    lines += [f"{s.name} -> {t.name}: {number:,}" for (s, t), number in sorted(edges.items())]
    share = counts["accepted"] / counts["asked"]
    return "\n".join(["", *lines, f"{share:.1%} accepted, {seconds:.1f} s"])


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(Load(batches=300, seeds=512, edges=1, epochs=10), id="short"),
        pytest.param(
            Load(batches=10_000, seeds=4_096, edges=100, epochs=100),
            id="long",
            marks=pytest.mark.soak,
        ),
    ],
)
def test_lesson_20_what_many_threads_wrote_equals_a_serial_replay_of_what_was_accepted(
    load: Load,
) -> None:
    started = time.perf_counter()
    state = RecordedStateTensor(load.seeds)
    counts = run(state, load.batches)
    edges = edges_of(state.log)
    print(told(counts, edges, time.perf_counter() - started))
    assert set(edges) == EDGES | REPLANTS
    assert min(edges.values()) >= load.edges
    assert counts["accepted"] == sum(edges.values()) >= counts["asked"] / 10
    assert counts["epochs"] >= load.epochs
    assert counts["epochs"] == sum(isinstance(entry, GraftingSignals) for entry in state.log)
    check_rows(state.view())
    assert same_state(replay(load.seeds, state.log), state)
    grafting = np.flatnonzero(state.host("columns")[0] == S.GRAFTING)
    assert state.grafting.seed_ids.tolist() == grafting.tolist()
