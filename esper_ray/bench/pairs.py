"""Two things timed in turn, and how sure their ratio is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Call = Callable[[], object]
Clock = Callable[[Call], float]


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median over pairs with its 95 % interval, and the median milliseconds of both sides.

    The interval is that of order statistics, which needs no model of the noise: Conover,
    Practical Nonparametric Statistics (1999), section 3.2.
    """

    value: float
    low: float
    high: float
    bare_ms: float
    ours_ms: float

    @classmethod
    def of(cls, bare: list[float], ours: list[float], extra: bool) -> Ratio:
        """From seconds of each pair; `extra` means that ours is what comes on top of bare."""
        one, other = np.array(bare), np.array(ours)
        ratios = np.sort(other / one + (1.0 if extra else 0.0))
        count = len(ratios)
        reach = math.ceil(0.98 * math.sqrt(count))  # 1.96 standard deviations of a fair coin
        low, high = max(0, count // 2 - reach), min(count - 1, (count - 1) // 2 + reach)
        return cls(
            float(np.median(ratios)),
            float(ratios[low]),
            float(ratios[high]),
            float(np.median(one)) * 1e3,
            float(np.median(other)) * 1e3,
        )


def compare(bare: Call, ours: Call, clock: Clock, pairs: int, *, extra: bool = False) -> Ratio:
    """Time both in the order A B B A, so that drift hits both alike."""
    for call in (bare, ours, bare, ours):
        clock(call)
    times: tuple[list[float], list[float]] = [], []
    for pair in range(pairs):
        for side in (0, 1) if pair % 2 else (1, 0):
            times[side].append(clock((bare, ours)[side]))
    return Ratio.of(*times, extra=extra)


def cpu_seconds(call: Call) -> float:
    """Processor time of this process: what other programs use does not count."""
    began = time.process_time()
    call()
    return time.process_time() - began


def cuda_seconds(call: Call) -> float:
    """Time between two events on the current stream."""
    import torch

    began, ended = torch.cuda.Event(True), torch.cuda.Event(True)  # type: ignore[no-untyped-call]
    began.record()
    call()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3
