"""Reports of one layer for tests, and what the policy makes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esper_ray.lifecycle import Cause, Decisions, LifecycleManager, Refusal
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.policy import Command, LayerReport, Measurement, PolicySettings, propose
from tests.builders import telemetry

HELPFUL = Measurement(loss_on=1.9, loss_off=2.0, delta=0.05, delta_low=0.04)
HARMFUL = Measurement(loss_on=2.2, loss_off=2.0, delta=-0.1, delta_low=-0.12)
VAGUE = Measurement(loss_on=2.0, loss_off=2.0, delta=0.0, delta_low=-0.01)
GUILTY = Measurement(loss_on=math.nan, loss_off=2.0, delta=math.nan, delta_low=math.nan)
NO_MINIMA = LifecycleManager(minimum_epochs={})
NEVER_PLANT = PolicySettings(germinate_after=10**6)
Moves = list[tuple[S, Cause]]
Verdict = tuple[int, S, str]


def report(
    states: Sequence[S],
    epochs: int | Sequence[int] = 0,
    *,
    stability: float | None = 0.97,
    measured: Mapping[int, Measurement] | None = None,
    **columns: Any,
) -> LayerReport:
    seen = telemetry(states, epochs, **columns)
    return LayerReport(seen, stability, measured or {})


def ints(*values: int) -> NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


def floats(*values: float) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


def moves_of(
    seen: LayerReport,
    settings: PolicySettings = NEVER_PLANT,
    commands: Mapping[int, Command] | None = None,
) -> dict[int, Moves]:
    """The moves that each seed would try, in order."""
    asked, second = propose(seen, settings, commands or {})
    moves: dict[int, Moves] = {}
    for row, seed in enumerate(asked.seed_ids.tolist()):
        moves[seed] = [(S(asked.target[row]), Cause(asked.cause[row]))]
        if second.target[row] >= 0:
            moves[seed].append((S(second.target[row]), Cause(second.cause[row])))
    return moves


def verdicts(decided: Decisions) -> list[Verdict]:
    """Seed, target and refusal of each row."""
    asked = decided.requests
    columns = (asked.seed_ids.tolist(), asked.target.tolist(), decided.reason.tolist())
    return [(seed, S(t), Refusal(code).name) for seed, t, code in zip(*columns, strict=True)]
