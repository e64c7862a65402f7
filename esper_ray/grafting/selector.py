"""Which strategy a seed gets when it germinates, and when it gets another while grafting."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from esper_ray.events import GraftingSignals
from esper_ray.grafting.memory import GraftingMemory
from esper_ray.grafting.outcomes import StrategyOutcomes
from esper_ray.grafting.registry import strategy_id, strategy_name
from esper_ray.grafting.settings import GraftingSettings
from esper_ray.grafting.strategies import (
    DriftControlledGrafting,
    MomentumGrafting,
    StabilityGrafting,
    stability_limits,
)

Ints = NDArray[np.int32]

_LONGEST_WAIT: Final = np.iinfo(np.int16).max
_LONGEST_STREAK: Final = np.iinfo(np.uint8).max


class StrategySelector:
    """Chooses strategies as `settings.selection` says; keeps no state of its own."""

    def __init__(self, settings: GraftingSettings) -> None:
        self.settings = settings
        self._arms = np.array([strategy_id(name) for name in settings.selection.arms], np.int32)

    def assign(
        self, layer_id: str, seed_ids: NDArray[np.int64], outcomes: StrategyOutcomes
    ) -> Ints:
        """Strategy of each newly germinated seed; equal arguments give equal answers."""
        match self.settings.selection.mode:
            case "ab":
                return self._by_hash(layer_id, seed_ids)
            case "bandit":
                return self._by_bound(len(seed_ids), outcomes)
            case _:
                number = strategy_id(self.settings.selection.strategy)
                return np.full(len(seed_ids), number, np.int32)

    def _by_hash(self, layer_id: str, seed_ids: NDArray[np.int64]) -> Ints:
        prefix = f"{self.settings.selection.experiment}:{layer_id}:"
        hashes = (hashlib.sha256(f"{prefix}{seed}".encode()) for seed in seed_ids.tolist())
        chosen = [int(digest.hexdigest(), 16) % len(self._arms) for digest in hashes]
        return self._arms[np.array(chosen, np.intp)]

    def _by_bound(self, count: int, outcomes: StrategyOutcomes) -> Ints:
        """UCB1; a seed counts as a try when it is planted, as its evaluation comes far later."""
        means = {arm: outcomes[strategy_name(arm)].mean_delta for arm in self._arms.tolist()}
        tries = {arm: outcomes[strategy_name(arm)].tries for arm in means}
        chosen = []
        for _ in range(count):
            bounds = _upper_bounds(means, tries)
            best = min(bounds, key=lambda arm: (-bounds[arm], arm))
            tries[best] += 1
            chosen.append(best)
        return np.array(chosen, np.int32)

    def switch(
        self, memory: GraftingMemory, strategy: Ints, epochs: Ints, signals: GraftingSignals
    ) -> Ints:
        """Strategies for this epoch, in mode performance; other modes keep theirs.

        A row that switches begins afresh in `memory`, and its alpha moves slowly from then on.
        """
        selection = self.settings.selection
        if selection.mode != "performance":
            return strategy
        memory.require_rows(signals.seed_ids)
        improving = signals.performance_delta > selection.improving_delta
        streak, waited = memory["improving"], memory["since_switch"]
        streak[:] = np.where(improving, streak + (streak < _LONGEST_STREAK), 0)
        waited += waited < _LONGEST_WAIT
        wanted = self._wanted(strategy, epochs, signals, streak >= selection.improving_epochs)
        moves = (wanted != strategy) & (waited >= selection.cooldown_epochs)
        memory.begin_strategy(moves)
        waited[moves] = 0
        memory["limited"][moves] = True
        return np.where(moves, wanted, strategy)

    def _wanted(
        self, strategy: Ints, epochs: Ints, signals: GraftingSignals, improving: NDArray[np.bool_]
    ) -> Ints:
        wanted = np.where(improving, np.int32(MomentumGrafting.strategy_id), strategy)
        drifting = signals.weight_drift > self.settings.drift_threshold
        wanted[drifting] = DriftControlledGrafting.strategy_id
        # A measure that is missing (NaN) compares False: it fails no check.
        failed = np.zeros_like(drifting)
        for name, limit in stability_limits(self.settings).items():
            failed |= getattr(signals, name) >= limit
        wanted[failed & (epochs % self.settings.check_every == 0)] = StabilityGrafting.strategy_id
        return wanted


def _upper_bounds(means: Mapping[int, float], tries: Mapping[int, int]) -> dict[int, float]:
    total = sum(tries.values())
    return {
        arm: mean + math.sqrt(2 * math.log(total) / tries[arm]) if tries[arm] else math.inf
        for arm, mean in means.items()
    }
