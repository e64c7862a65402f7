"""The five grafting strategies: each as a scalar rule to read, and over all rows to run.

Rules 1 and 2 are those of the Phase 2 plan, section 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from esper_ray.grafting.base import Floats, GraftingRows, GraftingStrategyBase, limit_step
from esper_ray.grafting.registry import register_strategy
from esper_ray.grafting.settings import GraftingSettings

_HOLD: Final = math.nan
_MOST_PAUSED: Final = np.iinfo(np.int16).max
_MOST_BAD: Final = np.iinfo(np.uint8).max
_REVERT_AT: Final = 3  # failed checks in a row after which stability goes back

Whole = TypeVar("Whole", int, NDArray[np.int32])


@register_strategy
class LinearGrafting(GraftingStrategyBase):
    """t / T."""

    strategy_id = 0
    name = "linear"

    def propose(self, epoch: int, total: int, metrics: Mapping[str, float]) -> float:
        """The straight ramp; no metric plays a part."""
        del metrics
        return epoch / total

    def advance(self, rows: GraftingRows) -> Floats:
        """The straight ramp."""
        return rows.epochs / rows.ramp


@register_strategy
class DriftControlledGrafting(GraftingStrategyBase):
    """Holds alpha while the weights drift and for some epochs after, then takes up the ramp."""

    strategy_id = 1
    name = "drift_controlled"
    memory = ("pause", "paused")
    reads = ("weight_drift",)

    def __init__(
        self,
        settings: GraftingSettings | None = None,
        *,
        drift_threshold: float | None = None,
        pause_duration: int | None = None,
    ) -> None:
        super().__init__(
            _changed(settings, drift_threshold=drift_threshold, pause_epochs=pause_duration)
        )
        self.pause_counter = 0
        self.paused = 0

    def elapsed(self, epoch: int) -> int:
        """Epochs that count for the ramp: with `resume: continue` those held do not."""
        return epoch if self.settings.resume == "jump" else epoch - self.paused

    def propose(self, epoch: int, total: int, metrics: Mapping[str, float]) -> float:
        """Rule 1; a drift above the threshold begins the pause anew."""
        drift = metrics.get("weight_drift", 0.0)
        if drift > self.settings.drift_threshold:
            self.pause_counter = self.settings.pause_epochs
        pausing = self.pause_counter > 0
        if pausing:
            self.pause_counter -= 1
        if pausing or not math.isfinite(drift):
            self.paused = min(self.paused + 1, _MOST_PAUSED)
            return _HOLD
        return self.elapsed(epoch) / total

    def advance(self, rows: GraftingRows) -> Floats:
        """Rule 1 over all rows."""
        alpha, pause, paused = _pause_rule(rows, rows.signal("weight_drift"), self.settings)
        rows.columns.update(pause=pause, paused=paused)
        return alpha


@register_strategy
class MomentumGrafting(GraftingStrategyBase):
    """t / T + v, where v follows the performance delta; alpha may fall."""

    strategy_id = 2
    name = "momentum"
    memory = ("velocity",)
    reads = ("performance_delta",)

    def __init__(
        self, settings: GraftingSettings | None = None, *, momentum_factor: float | None = None
    ) -> None:
        super().__init__(_changed(settings, momentum_factor=momentum_factor))
        self.velocity = 0.0

    def propose(self, epoch: int, total: int, metrics: Mapping[str, float]) -> float:
        """Rule 2; a delta that is not finite leaves the velocity as it is."""
        delta = metrics.get("performance_delta", 0.0)
        velocity = self.settings.momentum_factor * self.velocity + delta
        if not math.isfinite(velocity):
            return _HOLD
        self.velocity = velocity
        return epoch / total + velocity

    def advance(self, rows: GraftingRows) -> Floats:
        """Rule 2 over all rows."""
        velocity = _velocity(rows, self.settings)
        old = rows.columns["velocity"]
        rows.columns["velocity"] = np.where(np.isnan(velocity), old, velocity)
        return rows.epochs / rows.ramp + velocity


@register_strategy
class AdaptiveGrafting(GraftingStrategyBase):
    """Rule 1 under drift, rule 2 while the seed helps, else t / Ti; at most 2 / T per epoch."""

    strategy_id = 3
    name = "adaptive"
    memory = ("pause", "paused", "velocity", "ramp")
    reads = ("weight_drift", "performance_delta")

    def __init__(self, settings: GraftingSettings | None = None) -> None:
        super().__init__(settings)
        self.cautious = DriftControlledGrafting(settings)
        self.eager = MomentumGrafting(settings)
        self.ramp = 0

    def propose(self, epoch: int, total: int, metrics: Mapping[str, float]) -> float:
        """One of three rules; alpha never falls and rises by 2 / total at most."""
        held = metrics.get("current_alpha", 0.0)
        alpha = self._choose(epoch, total, metrics)
        return min(max(alpha, held), held + 2 / total) if math.isfinite(alpha) else _HOLD

    def _choose(self, epoch: int, total: int, metrics: Mapping[str, float]) -> float:
        drift = metrics.get("weight_drift", 0.0)
        delta = metrics.get("performance_delta", 0.0)
        ramp = self.ramp or total
        if drift > self.settings.adaptive_drift or self.cautious.pause_counter > 0:
            self.ramp = min(_five_quarters(ramp), 2 * total)
            return self.cautious.propose(epoch, total, metrics)
        if not (math.isfinite(drift) and math.isfinite(delta)):
            return _HOLD
        elapsed = self.cautious.elapsed(epoch)
        if delta > self.settings.adaptive_delta:
            self.ramp = max(ramp * 9 // 10, _half(total))
            return self.eager.propose(elapsed, total, metrics)
        return elapsed / ramp

    def advance(self, rows: GraftingRows) -> Floats:
        """The three rules over all rows, each row taking the result of one."""
        drift, delta = rows.signal("weight_drift"), rows.signal("performance_delta")
        old = rows.columns
        slow = (drift > self.settings.adaptive_drift) | (old["pause"] > 0)
        known = np.isfinite(drift) & np.isfinite(delta)
        fast = ~slow & known & (delta > self.settings.adaptive_delta)
        begun = np.where(old["ramp"] > 0, old["ramp"], rows.ramp)
        ramp, velocity = begun.astype(np.int32), _velocity(rows, self.settings)
        elapsed = _elapsed(rows, self.settings)
        plain = np.where(known, elapsed / ramp, _HOLD)
        quick = elapsed / rows.ramp + velocity
        # Without drift rule 1 changes nothing in a row that is not pausing.
        held, pause, paused = _pause_rule(rows, np.where(slow, drift, 0.0), self.settings)
        slower = np.minimum(_five_quarters(ramp), 2 * rows.ramp)
        faster = np.maximum(ramp * 9 // 10, _half(rows.ramp))
        rows.columns = {
            "pause": pause,
            "paused": paused,
            "velocity": np.where(fast & ~np.isnan(velocity), velocity, old["velocity"]),
            "ramp": _pick(old["ramp"], (slow, slower), (fast, faster)),
        }
        alpha: Floats = _pick(plain, (slow, held), (fast, quick))
        return limit_step(alpha, rows.alpha, rows.ramp)


@register_strategy
class StabilityGrafting(GraftingStrategyBase):
    """Checks every few epochs: halves the ramp after a failed check, goes back after three."""

    strategy_id = 4
    name = "stability"
    memory = ("last", "bad")
    reads = ("loss_variance", "gradient_norm", "accuracy_variance")

    def __init__(self, settings: GraftingSettings | None = None) -> None:
        super().__init__(settings)
        self.last = 0.0
        self.bad = 0

    def propose(self, epoch: int, total: int, metrics: Mapping[str, float]) -> float:
        """`last` is alpha at the last stable check, `bad` counts failed checks since."""
        if epoch % self.settings.check_every == 0:
            limits = stability_limits(self.settings)
            measured = {name: metrics.get(name, math.nan) for name in limits}
            if not all(map(math.isfinite, measured.values())):
                return _HOLD
            if all(measured[name] < limit for name, limit in limits.items()):
                self.last, self.bad = metrics.get("current_alpha", 0.0), 0
            else:
                self.bad = min(self.bad + 1, _MOST_BAD)
        if self.bad >= _REVERT_AT:
            return self.last
        return epoch / total * (0.5 if self.bad else 1.0)

    def advance(self, rows: GraftingRows) -> Floats:
        """The same over all rows."""
        check = rows.epochs % self.settings.check_every == 0
        known, stable = np.ones_like(check), np.ones_like(check)
        for name, limit in stability_limits(self.settings).items():
            measured = rows.signal(name)
            known &= np.isfinite(measured)
            stable &= measured < limit
        unknown = check & ~known
        stable &= check & known
        unstable = check & known & ~stable
        last = _pick(rows.columns["last"], (stable, rows.alpha))
        bad = rows.columns["bad"]
        bad = _pick(bad + (unstable & (bad < _MOST_BAD)), (stable, 0))
        rows.columns.update(last=last, bad=bad)
        ramp = rows.epochs / rows.ramp
        return _pick(ramp, (unknown, _HOLD), (bad >= _REVERT_AT, last), (bad > 0, ramp * 0.5))


def stability_limits(settings: GraftingSettings) -> dict[str, float]:
    """Signals that a stability check reads, each with the value that it must stay below."""
    return {
        "loss_variance": settings.loss_variance_max,
        "gradient_norm": settings.gradient_norm_max,
        "accuracy_variance": settings.accuracy_variance_max,
    }


def _changed(settings: GraftingSettings | None, **given: float | None) -> GraftingSettings:
    named: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return replace(settings or GraftingSettings(), **named)


def _pick(default: Any, *cases: tuple[NDArray[np.bool_], Any]) -> NDArray[Any]:
    picked: NDArray[Any] = default
    for mask, values in reversed(cases):
        picked = np.where(mask, values, picked)
    return picked


def _elapsed(rows: GraftingRows, settings: GraftingSettings) -> NDArray[Any]:
    return rows.epochs if settings.resume == "jump" else rows.epochs - rows.columns["paused"]


def _pause_rule(
    rows: GraftingRows, drift: Floats, settings: GraftingSettings
) -> tuple[Floats, NDArray[np.int16], NDArray[np.int16]]:
    """Alpha (NaN = hold), pause and paused after rule 1."""
    paused = rows.columns["paused"]
    pause = np.where(drift > settings.drift_threshold, settings.pause_epochs, rows.columns["pause"])
    hold = (pause > 0) | ~np.isfinite(drift)
    alpha = np.where(hold, _HOLD, _elapsed(rows, settings) / rows.ramp)
    return alpha, np.maximum(pause - 1, 0), paused + (hold & (paused < _MOST_PAUSED))


def _velocity(rows: GraftingRows, settings: GraftingSettings) -> Floats:
    """Velocity after rule 2; NaN = not finite, keep the old one."""
    velocity = settings.momentum_factor * rows.columns["velocity"]
    velocity += rows.signal("performance_delta")
    return np.where(np.isfinite(velocity), velocity, np.nan)


def _five_quarters(ramp: Whole) -> Whole:
    return (ramp * 5 + 3) // 4  # rounded up


def _half(ramp: int) -> int:
    return (ramp + 1) // 2  # rounded up: the least whole number within [T / 2, 2 T]
