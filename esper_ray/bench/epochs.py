"""Runs that are trained side by side, an epoch of each in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from esper_ray.runtime import Runtime


def clocked(runtime: Runtime) -> Callable[[int], float]:
    """A function that trains epoch n and returns seconds per optimiser step; the run is opened."""
    runtime.open()
    steps = runtime.config.seeds.epoch_steps

    def train(epoch: int) -> float:
        began = time.perf_counter()
        runtime.train_epoch(epoch)
        return (time.perf_counter() - began) / steps

    return train


def interleaved(
    clocks: Mapping[str, Callable[[int], float]], epochs: int, warm_up: int
) -> dict[str, list[float]]:
    """Seconds per step in each epoch but the first `warm_up`."""
    times: dict[str, list[float]] = {name: [] for name in clocks}
    for epoch in range(epochs):
        for name, clock in clocks.items():
            seconds = clock(epoch)
            if epoch >= warm_up:
                times[name].append(seconds)
    return times
