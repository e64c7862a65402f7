"""What a user may choose about grafting; every value is checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from numbers import Integral
from typing import Final, Literal, get_args

from esper_ray.errors import ConfigError
from esper_ray.grafting.registry import strategy_id

Resume = Literal["jump", "continue"]
SelectionMode = Literal["fixed", "performance", "ab", "bandit"]

_INT16_MAX: Final = 2**15 - 1  # largest value of the int16 columns that count epochs
_UINT8_MAX: Final = 2**8 - 1
_MODES_WITH_ARMS: Final = ("ab", "bandit")

# A range of whole numbers takes whole numbers only.
_GRAFTING_RANGES: Final[Mapping[str, tuple[float, float]]] = {
    "ramp_epochs": (1, _INT16_MAX // 2),  # an adaptive ramp grows to twice that
    "drift_threshold": (0.0, inf),
    "pause_epochs": (0, _INT16_MAX),
    "momentum_factor": (0.0, 1.0),
    "adaptive_drift": (0.0, inf),
    "adaptive_delta": (0.0, inf),
    "check_every": (1, _INT16_MAX),
    "loss_variance_max": (0.0, inf),
    "gradient_norm_max": (0.0, inf),
    "accuracy_variance_max": (0.0, inf),
}
_SELECTOR_RANGES: Final[Mapping[str, tuple[float, float]]] = {
    "improving_delta": (0.0, inf),
    "improving_epochs": (1, _UINT8_MAX),
    "cooldown_epochs": (0, _INT16_MAX),
}


@dataclass(frozen=True, slots=True)
class SelectorSettings:
    """How a seed gets its strategy: `strategy`, or one of `arms` in the modes ab and bandit."""

    mode: SelectionMode = "fixed"
    strategy: str = "drift_controlled"
    arms: tuple[str, ...] = ()
    experiment: str = ""
    improving_delta: float = 0.01
    improving_epochs: int = 3
    cooldown_epochs: int = 10

    def __post_init__(self) -> None:
        _check_choice("mode", self.mode, get_args(SelectionMode))
        _check_ranges(self, _SELECTOR_RANGES)
        for name in (self.strategy, *self.arms):
            strategy_id(name)
        if len(set(self.arms)) < len(self.arms):
            raise ConfigError(f"arms must not repeat, got {self.arms}", "name each strategy once")
        if self.mode in _MODES_WITH_ARMS and not self.arms:
            raise ConfigError(
                f"mode {self.mode!r} needs arms, got none", "list the strategies to compare in arms"
            )


@dataclass(frozen=True, slots=True)
class GraftingSettings:
    """`ramp_epochs` from alpha 0 to 1; drift is relative weight change per optimiser step."""

    ramp_epochs: int = 50
    drift_threshold: float = 0.01
    pause_epochs: int = 10
    resume: Resume = "jump"
    momentum_factor: float = 0.1
    adaptive_drift: float = 0.005
    adaptive_delta: float = 0.01
    check_every: int = 5
    loss_variance_max: float = 0.1
    gradient_norm_max: float = 10.0
    accuracy_variance_max: float = 0.05
    selection: SelectorSettings = field(default_factory=SelectorSettings)

    def __post_init__(self) -> None:
        _check_choice("resume", self.resume, get_args(Resume))
        _check_ranges(self, _GRAFTING_RANGES)


def _check_ranges(settings: object, ranges: Mapping[str, tuple[float, float]]) -> None:
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        whole = isinstance(low, int)
        if low <= value <= high and (isinstance(value, Integral) or not whole):
            continue
        kind = "a whole number" if whole else "a number"
        raise ConfigError(
            f"{name} must be {kind} in {low}..{high}, got {value}",
            f"set {name} to {kind} from {low} to {high}",
        )


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        known = ", ".join(choices)
        raise ConfigError(
            f"{name} must be one of {known}, got {value!r}", f"choose one of: {known}"
        )
