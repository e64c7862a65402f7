"""All seeds at once give, to the bit, what each seed alone gives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from esper_ray.events import GraftingSignals
from esper_ray.grafting import (
    STRATEGIES,
    AdaptiveGrafting,
    DriftControlledGrafting,
    GraftingMemory,
    GraftingRows,
    GraftingSettings,
    GraftingStrategyBase,
    LinearGrafting,
    MomentumGrafting,
    StabilityGrafting,
    advance_alpha,
    register_strategy,
    strategy_id,
)
from esper_ray.grafting.base import Floats

MEASURES = tuple(field.name for field in fields(GraftingSignals) if field.name != "seed_ids")
UNKNOWN = 99
odd = [math.nan, math.inf, -math.inf, 0.0, 1e308, -1e308]
values = {
    "weight_drift": st.sampled_from([0.004, 0.005, 0.0051, 0.01, 0.0101, 0.03, *odd]),
    "performance_delta": st.sampled_from([-0.4, 0.01, 0.011, 0.05, 0.3, *odd]),
    "loss_variance": st.sampled_from([0.05, 0.1, *odd]),
    "gradient_norm": st.sampled_from([9.0, 10.0, *odd]),
    "accuracy_variance": st.sampled_from([0.04, 0.05, *odd]),
}
choices = st.builds(
    GraftingSettings,
    ramp_epochs=st.integers(1, 30),
    pause_epochs=st.integers(0, 5),
    resume=st.sampled_from(["jump", "continue"]),
    momentum_factor=st.sampled_from([0.0, 0.1, 1.0]),
    adaptive_drift=st.sampled_from([0.005, 0.02]),
    check_every=st.integers(1, 4),
)


@dataclass(frozen=True)
class History:
    """What some seeds met: `measures[epoch][name]` is (seeds,)."""

    strategy: NDArray[np.int32]
    first_epoch: NDArray[np.int32]
    measures: list[dict[str, Floats]]

    def signals(self, epoch: int) -> GraftingSignals:
        return GraftingSignals(np.arange(len(self.strategy)), **self.measures[epoch])

    def only(self, seed: int) -> History:
        at = slice(seed, seed + 1)
        measures = [{name: one[at] for name, one in epoch.items()} for epoch in self.measures]
        return History(self.strategy[at], self.first_epoch[at], measures)


@st.composite
def histories(draw: st.DrawFn, known: bool = False) -> History:
    seeds, epochs = draw(st.integers(1, 7)), draw(st.integers(1, 25))
    numbers = st.sampled_from([*STRATEGIES, *([] if known else [UNKNOWN, -1])])

    def column(of: st.SearchStrategy[Any], dtype: type) -> NDArray[Any]:
        return np.array(draw(st.lists(of, min_size=seeds, max_size=seeds)), dtype)

    return History(
        column(numbers, np.int32),
        column(st.integers(0, 6), np.int32),
        [{name: column(values[name], np.float64) for name in MEASURES} for _ in range(epochs)],
    )


def newborn(seeds: int) -> tuple[GraftingMemory, NDArray[np.float32]]:
    memory = GraftingMemory()
    memory.enter(np.arange(seeds))
    return memory, np.zeros(seeds, np.float32)


def together(history: History, chosen: GraftingSettings) -> NDArray[np.float32]:
    """(epochs, seeds) alphas of all seeds at once."""
    memory, alpha = newborn(len(history.strategy))
    alphas = []
    for epoch in range(len(history.measures)):
        epochs = history.first_epoch + np.int32(epoch)
        signals = history.signals(epoch)
        alpha = advance_alpha(memory, history.strategy, epochs, alpha, signals, chosen)
        alphas.append(alpha)
    return np.array(alphas)


def alone(history: History, seed: int, chosen: GraftingSettings) -> list[np.float32]:
    """Alphas of one seed by the scalar rule."""
    rule = STRATEGIES[int(history.strategy[seed])](chosen)
    alpha, alphas = 0.0, []
    for epoch, measures in enumerate(history.measures):
        metrics = {name: float(one[seed]) for name, one in measures.items()}
        alpha = rule.compute_alpha(
            int(history.first_epoch[seed]) + epoch,
            chosen.ramp_epochs,
            metrics | {"current_alpha": alpha},
        )
        alphas.append(np.float32(alpha))
        alpha = float(alphas[-1])  # the state column is float32
    return alphas


@settings(max_examples=120, deadline=None)
@given(history=histories(known=True), chosen=choices)
def test_the_vectorised_step_is_the_scalar_rule(history: History, chosen: GraftingSettings) -> None:
    alphas = together(history, chosen)
    for seed in range(len(history.strategy)):
        assert alphas[:, seed].tolist() == alone(history, seed, chosen)


@settings(max_examples=40, deadline=None)
@given(history=histories(), chosen=choices)
def test_all_seeds_at_once_is_each_seed_alone(history: History, chosen: GraftingSettings) -> None:
    alphas = together(history, chosen)
    assert ((alphas >= 0) & (alphas <= 1)).all()
    for seed in range(len(history.strategy)):
        assert np.array_equal(alphas[:, seed : seed + 1], together(history.only(seed), chosen))


def restored(memory: GraftingMemory) -> GraftingMemory:
    loaded = GraftingMemory()
    loaded.load(memory.arrays())
    return loaded


@settings(max_examples=25, deadline=None)
@given(history=histories(), chosen=choices)
def test_a_stored_memory_goes_on_identically(history: History, chosen: GraftingSettings) -> None:
    memory, alpha = newborn(len(history.strategy))
    alphas = []
    for epoch in range(len(history.measures)):
        memory = restored(memory)
        epochs = history.first_epoch + np.int32(epoch)
        signals = history.signals(epoch)
        alpha = advance_alpha(memory, history.strategy, epochs, alpha, signals, chosen)
        alphas.append(alpha)
    assert np.array_equal(np.array(alphas), together(history, chosen))


def calm(seeds: int, **measures: float) -> GraftingSignals:
    of = {name: np.full(seeds, measures.get(name, 0.0)) for name in MEASURES}
    return GraftingSignals(np.arange(seeds), **of)


def step(
    memory: GraftingMemory,
    kinds: list[type[GraftingStrategyBase] | int],
    epoch: int,
    alpha: list[float],
    signals: GraftingSignals,
) -> list[float]:
    numbers = [kind if isinstance(kind, int) else kind.strategy_id for kind in kinds]
    result = advance_alpha(
        memory,
        np.array(numbers, np.int32),
        np.full(len(kinds), epoch, np.int32),
        np.array(alpha, np.float32),
        signals,
        GraftingSettings(ramp_epochs=8),
    )
    assert result.dtype == np.float32
    return [float(one) for one in result]


def test_each_row_follows_its_own_strategy() -> None:
    memory, _ = newborn(6)
    every: list[type[GraftingStrategyBase] | int] = [
        LinearGrafting,
        DriftControlledGrafting,
        MomentumGrafting,
        AdaptiveGrafting,
        StabilityGrafting,
        UNKNOWN,
    ]
    signals = calm(6, weight_drift=0.02, performance_delta=0.125, gradient_norm=99.0)
    alphas = step(memory, every, 5, [0.25] * 6, signals)
    assert alphas == [0.625, 0.25, 0.75, 0.25, 0.3125, 0.25]
    assert memory["pause"].tolist() == [0, 9, 0, 9, 0, 0]
    assert memory["velocity"].tolist() == [0, 0, 0.125, 0, 0, 0]
    assert memory["ramp"].tolist() == [0, 0, 0, 10, 0, 0]
    assert memory["bad"].tolist() == [0, 0, 0, 0, 1, 0]


def test_no_rows_are_no_work() -> None:
    assert step(GraftingMemory(), [], 1, [], calm(0)) == []


def test_counters_saturate_instead_of_wrapping() -> None:
    memory, _ = newborn(2)
    memory["paused"][0], memory["bad"][1] = 32767, 255
    signals = calm(2, weight_drift=1.0, gradient_norm=99.0)
    step(memory, [DriftControlledGrafting, StabilityGrafting], 5, [0.5, 0.5], signals)
    assert (memory["paused"][0], memory["bad"][1]) == (32767, 255)


def test_a_limited_row_moves_by_two_over_t_at_most_and_never_falls() -> None:
    memory, _ = newborn(4)
    memory["limited"][:] = [True, False, True, False]
    alphas = step(memory, [LinearGrafting] * 4, 4, [0.125, 0.125, 0.75, 0.75], calm(4))
    assert alphas == [0.375, 0.5, 0.75, 0.5]


def test_signals_of_other_seeds_are_refused() -> None:
    memory, _ = newborn(2)
    with pytest.raises(ValueError, match="signals of 3 seeds do not match the 2 seeds"):
        step(memory, [LinearGrafting] * 2, 1, [0.0, 0.0], calm(3))


def test_a_seed_that_enters_anew_has_forgotten_its_pause() -> None:
    memory, _ = newborn(2)
    kinds: list[type[GraftingStrategyBase] | int] = [DriftControlledGrafting] * 2
    step(memory, kinds, 1, [0.0, 0.0], calm(2, weight_drift=1.0))
    memory.leave(np.array([1]))
    memory.enter(np.array([1]))
    assert step(memory, kinds, 2, [0.0, 0.0], calm(2)) == [0.0, 0.25]


class Erratic(GraftingStrategyBase):
    """A strategy of a user: goes out of bounds by turns, NaN every third epoch."""

    strategy_id = 100
    name = "erratic"
    memory = ("velocity",)

    def __init__(self, settings: GraftingSettings | None = None) -> None:
        super().__init__(settings)
        self.velocity = 0.0

    def propose(self, epoch: int, total: int, metrics: Mapping[str, float]) -> float:
        del total, metrics
        self.velocity += 2.0
        return math.nan if epoch % 3 == 0 else (-1.0) ** epoch * self.velocity

    def advance(self, rows: GraftingRows) -> Floats:
        rows.columns["velocity"] = rows.columns["velocity"] + 2.0
        alpha = np.where(rows.epochs % 2 == 0, 1.0, -1.0) * rows.columns["velocity"]
        return np.where(rows.epochs % 3 == 0, np.nan, alpha)


@pytest.fixture
def erratic() -> Iterator[type[GraftingStrategyBase]]:
    yield register_strategy(Erratic)
    del STRATEGIES[Erratic.strategy_id]


def test_a_registered_strategy_needs_no_other_change(erratic: type[GraftingStrategyBase]) -> None:
    assert strategy_id("erratic") == 100
    memory, alphas = newborn(2)[0], [0.0, 0.0]
    rule, seen = erratic(), list[float]()
    for epoch in range(1, 8):
        alphas = step(memory, [LinearGrafting, erratic], epoch, alphas, calm(2))
        assert alphas[1] == rule.compute_alpha(epoch, 8, {"current_alpha": seen[-1] if seen else 0})
        seen.append(alphas[1])
    assert seen == [0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert memory["velocity"].tolist() == [0.0, 14.0]


def test_rows_are_all_rows_unless_told_otherwise() -> None:
    rows = GraftingRows(np.arange(2, dtype=np.int32), np.zeros(2), 8, {}, calm(2, weight_drift=0.5))
    assert rows.signal("weight_drift").tolist() == [0.5, 0.5]
    assert LinearGrafting().advance(rows).tolist() == [0.0, 0.125]
