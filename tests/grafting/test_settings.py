"""Settings refuse what cannot work, and say what can."""

from __future__ import annotations

import math
from typing import Any

import pytest

from esper_ray.errors import ConfigError
from esper_ray.grafting import GraftingSettings, SelectorSettings

IMPOSSIBLE: list[tuple[type, str, Any]] = [
    (GraftingSettings, "ramp_epochs", 0),
    (GraftingSettings, "ramp_epochs", 16384),  # twice that is no int16
    (GraftingSettings, "ramp_epochs", 2.5),
    (GraftingSettings, "pause_epochs", -1),
    (GraftingSettings, "pause_epochs", 2**15),
    (GraftingSettings, "drift_threshold", -0.1),
    (GraftingSettings, "momentum_factor", 1.1),
    (GraftingSettings, "adaptive_drift", -1.0),
    (GraftingSettings, "adaptive_delta", -1.0),
    (GraftingSettings, "check_every", 0),
    (GraftingSettings, "loss_variance_max", -1.0),
    (GraftingSettings, "gradient_norm_max", -1.0),
    (GraftingSettings, "accuracy_variance_max", -1.0),
    (SelectorSettings, "improving_delta", -0.01),
    (SelectorSettings, "improving_epochs", 0),
    (SelectorSettings, "improving_epochs", 256),
    (SelectorSettings, "cooldown_epochs", 2**15),
]
NAMES = sorted({(kind.__name__, name) for kind, name, _ in IMPOSSIBLE})


@pytest.mark.parametrize(("kind", "name", "value"), IMPOSSIBLE)
def test_impossible_values_are_named_with_the_allowed_range(
    kind: type, name: str, value: Any
) -> None:
    with pytest.raises(
        ConfigError, match=rf"{name} must be a .* in .*\.\..*, got {value}"
    ) as error:
        kind(**{name: value})
    assert name in error.value.hint


@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_no_number_may_be_nan(kind: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must .*got nan"):
        globals()[kind](**{name: math.nan})


@pytest.mark.parametrize(
    ("kind", "name"), [(GraftingSettings, "resume"), (SelectorSettings, "mode")]
)
def test_an_unknown_choice_lists_the_known_ones(kind: type, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be one of .*'later'") as error:
        kind(**{name: "later"})
    assert error.value.hint.startswith("choose one of: ")


def test_limits_of_the_ranges_are_allowed() -> None:
    GraftingSettings(ramp_epochs=1, pause_epochs=0, drift_threshold=math.inf, momentum_factor=1)
    GraftingSettings(ramp_epochs=16383, pause_epochs=32767)


@pytest.mark.parametrize("given", [{"strategy": "cubic"}, {"arms": ("linear", "cubic")}])
def test_an_unknown_strategy_lists_the_known_ones(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="'cubic'") as error:
        SelectorSettings(**given)
    assert error.value.hint == (
        "choose one of: linear, drift_controlled, momentum, adaptive, stability"
    )


@pytest.mark.parametrize("mode", ["ab", "bandit"])
def test_comparing_modes_need_arms(mode: Any) -> None:
    with pytest.raises(ConfigError, match=f"mode '{mode}' needs arms"):
        SelectorSettings(mode=mode)
    assert SelectorSettings(mode=mode, arms=("linear",)).arms == ("linear",)


def test_arms_do_not_repeat() -> None:
    with pytest.raises(ConfigError, match="arms must not repeat"):
        SelectorSettings(mode="ab", arms=("linear", "momentum", "linear"))
