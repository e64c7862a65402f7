"""Random lives of many seeds: the tick beside the numpy form, to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from esper_ray.events import GraftingSignals, TransitionBatch
from esper_ray.grafting import GraftingSettings, SelectorSettings
from esper_ray.lifecycle import TERMINAL_STATES, TRANSITION_TABLE, Cause
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.seeds import ExtendedStateTensor
from esper_ray.seeds.device_tick import DeviceTick

MEASURES = tuple(GraftingSignals.__dataclass_fields__)[1:]
nan, inf = float("nan"), float("inf")

RULES = (
    GraftingSettings(),
    GraftingSettings(ramp_epochs=6, pause_epochs=2, check_every=2, resume="continue"),
    GraftingSettings(
        ramp_epochs=7,
        pause_epochs=3,
        check_every=2,
        momentum_factor=0.3,
        selection=SelectorSettings("performance", cooldown_epochs=2, improving_epochs=1),
    ),
)
_DRAWN = {
    "weight_drift": (0.0, 0.005, 0.01, 0.02, nan, inf),
    "performance_delta": (0.0, -0.013, 0.01, 0.31, -1e308, 1.7e308, nan, -inf),
    "loss_variance": (0.05, 0.1, 0.2, nan),
    "gradient_norm": (1.0, 10.0, 20.0, nan),
    "accuracy_variance": (0.0, 0.05, 0.1, nan),
}
"""Every threshold is among them: rounded to float32, it would decide otherwise."""
_SCALES = (0.012, 0.03, 0.11, 11.0, 0.055)


class Life:
    """One state kept by the tick on `device`, and its twin kept by numpy on the CPU."""

    def __init__(self, seeds: int, device: str, rules: GraftingSettings, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.rules, self.epoch = rules, 0
        self.plain = ExtendedStateTensor(seeds)
        ids = np.arange(seeds, dtype=np.int64)
        for source in range(S.GRAFTING):  # three in four
            assert self.plain.compare_and_set(_road(ids[ids % 4 > 0], source))[0].all()
        self._age()
        self.ours = copy.deepcopy(self.plain).to(device)
        self.ticks = DeviceTick(self.ours, rules)
        self.both: Callable[[], object] = self.ticks.tick

    def _age(self) -> None:
        """Bring some rows close to where a number ends."""
        plain, memory = self.plain, self.plain.grafting
        plain.columns[plain.EPOCHS_IN_STATE, ::9] = 2**31 - 3
        plain.transition_count[::5] = 32_757
        plain.generation[::6] = 2**15 - 3
        plain.metrics.fill_(0.5)
        plain.metrics_valid.fill_(15)
        plain.columns[plain.EVALUATION_SCORE :] = 7
        for name, value in (("paused", 2**15 - 3), ("since_switch", 2**15 - 3)):
            memory[name][::7] = value
        memory["bad"][::8], memory["improving"][::8] = 253, 253
        plain.changed()

    def live(self) -> None:
        """One epoch: moves, of which some are refused, then alphas; in one launch or in two."""
        batch = self.moves()
        self.ticks.ask(batch)
        _, reason = self.plain.compare_and_set(batch)
        read = self.signals(self.plain.grafting.seed_ids.astype(np.int64))
        self.plain.advance(read, self.rules)
        self.ticks.sense(read)
        if self.epoch % 2:
            self.both()
        else:
            self.ticks.tick(epoch=False)
            self.ticks.tick(moves=False)
        found = self.ticks.reasons(batch)
        assert np.array_equal(found, reason), (found, reason)
        self.epoch += 1

    def moves(self) -> TransitionBatch:
        """About half of the seeds, most by a legal way, some with a slip."""
        random, count = self.random, self.plain.num_seeds
        [ids] = np.nonzero(random.random(count) < 0.5)
        state = self.plain.columns[0].numpy()[ids].copy()
        ways = TRANSITION_TABLE[state] * random.random((len(ids), len(S)))
        ended = np.isin(state, list(TERMINAL_STATES))
        stays = (state == S.GRAFTING) & (random.random(len(ids)) < 0.95)
        ids, state, ways, ended = (x[~stays] for x in (ids, state, ways, ended))
        target, rows = np.where(ended, 0, ways.argmax(axis=1)), len(ids)
        cause = np.where(ended, Cause.REPLANT, random.integers(0, 4, rows))
        generation = self.plain.generation.numpy()[ids].copy()

        def slip(right: NDArray[Any], low: int, high: int) -> NDArray[np.int32]:
            wrong = random.random(rows) < 0.04
            return np.where(wrong, random.integers(low, high, rows), right).astype(np.int32)

        target = slip(target, -3, 13)
        return TransitionBatch(
            "layer",
            self.epoch,
            self.epoch,
            ids,
            slip(state, -1, 12),
            slip(generation, 0, 5).astype(np.int16),
            np.where(target == -1, 99, target).astype(np.int32),
            slip(cause, -1, 7),
            slip(random.integers(-1, 4, rows), -2, 9),
            slip(random.integers(-1, 5, rows), -3, 9),
            random.integers(-1, 99, rows).astype(np.int32),
        )

    def signals(self, ids: NDArray[np.int64]) -> GraftingSignals:
        """Random numbers, or such as decide between rules."""
        random, rows = self.random, len(ids)
        measures = {}
        for name, scale in zip(MEASURES, _SCALES, strict=True):
            special = random.choice(_DRAWN[name], rows)
            usual = random.random(rows) * scale
            measures[name] = np.where(random.random(rows) < 0.25, special, usual)
        return GraftingSignals(ids, **measures)

    def compare(self) -> None:
        """AssertionError unless both are the same to the bit, in columns and in memory."""
        self.ticks.settle()
        ours = copy.deepcopy(self.ours).to("cpu")
        for name, buffer in self.plain.named_buffers():
            other = ours.get_buffer(name)
            wrong = int((buffer.view(torch.uint8) != other.view(torch.uint8)).sum())
            assert wrong == 0, f"{name}: {wrong} bytes differ"
        for name, values in self.plain.grafting.arrays().items():
            assert values.tobytes() == ours.grafting[name].tobytes(), f"memory {name} differs"


def _road(ids: NDArray[np.int64], source: int) -> TransitionBatch:
    def column(value: int) -> NDArray[np.int32]:
        return np.full(len(ids), value, np.int32)

    strategy, generation = (ids % 5).astype(np.int32), np.zeros(len(ids), np.int16)
    return TransitionBatch(
        "layer",
        0,
        source,
        ids,
        column(source),
        generation,
        column(source + 1),
        column(0),
        column(0),
        strategy,
        column(-1),
    )
