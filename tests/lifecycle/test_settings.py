"""Thresholds, budgets and minima that cannot be used are refused, and the error names them."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from esper_ray.errors import ConfigError
from esper_ray.lifecycle import (
    MINIMUM_EPOCHS,
    TERMINAL_STATES,
    UNLIMITED,
    Budgets,
    GateSettings,
    LifecycleManager,
)
from esper_ray.lifecycle import ExtendedLifecycle as S
from tests.lifecycle.rows import Row, judge, names_of

THRESHOLDS = [f.name for f in fields(GateSettings)]
BUDGETS = [f.name for f in fields(Budgets)]
COUNTS = ["cull_error_count", "inconclusive_epochs"]
RANGES = {
    "reconstruction_loss_max": (0.0, 1e9),
    "delta_ratio_max": (0.0, 1e9),
    "alpha_one_loss_ratio_max": (0.0, 1e9),
    "performance_delta_min": (-1.0, 1.0),
    "stability_min": (0.0, 1.0),
    "cull_performance_delta": (-1e9, 1.0),
    "cull_error_rate": (0.0, 1.0),
    "cull_error_count": (0.0, 1e9),
    "inconclusive_epochs": (0.0, 1e9),
    "improvement_min": (0.0, 1.0),
    "final_stability_min": (0.0, 1.0),
}


def settings(**given: Any) -> GateSettings:
    return GateSettings(**given)


def test_the_default_thresholds_are_those_of_the_semantics() -> None:
    assert {f.name: f.default for f in fields(GateSettings)} == {
        "reconstruction_loss_max": 0.01,
        "delta_ratio_max": 0.5,
        "alpha_one_loss_ratio_max": 1.01,
        "performance_delta_min": 0.0,
        "stability_min": 0.8,
        "cull_performance_delta": -0.05,
        "cull_error_rate": 0.1,
        "cull_error_count": 5,
        "inconclusive_epochs": 90,
        "improvement_min": 0.002,
        "final_stability_min": 0.95,
    }


def test_changed_thresholds_are_listed_by_name() -> None:
    assert GateSettings().changed() == {}
    changed = GateSettings(stability_min=0.5, cull_error_count=7)
    assert changed.changed() == {"stability_min": 0.5, "cull_error_count": 7}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", THRESHOLDS)
def test_lesson_26_a_threshold_that_is_not_a_number_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"gate threshold {name} is {value}, not a"):
        settings(**{name: value})
    with pytest.raises(ConfigError, match=f"gate threshold {name} is {value}, not a"):
        GateSettings.of({name: value})


@pytest.mark.parametrize("name", THRESHOLDS)
def test_a_threshold_may_lie_at_both_ends_of_its_range_and_no_further(name: str) -> None:
    low, high = RANGES[name]
    step = 1 if name in COUNTS else 1e-6 * max(1.0, abs(high), abs(low))
    assert getattr(settings(**{name: low}), name) == low
    assert getattr(settings(**{name: high}), name) == high
    for beyond in (low - step, high + step):
        with pytest.raises(ConfigError, match="gate threshold") as caught:
            settings(**{name: beyond})
        assert f"{name} is {beyond}" in caught.value.message
        assert f"from {low:g} to {high:g}" in caught.value.message
        assert caught.value.hint == "change lifecycle.gates"


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_is_a_whole_number(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 5.5, not a whole number"):
        settings(**{name: 5.5})
    with pytest.raises(ConfigError, match=f"{name} is 5.5, not a whole number"):
        GateSettings.of({name: 5.5})


def test_thresholds_given_by_name_keep_the_defaults_of_the_others() -> None:
    given = GateSettings.of({"stability_min": 0.5, "cull_error_count": 7.0})
    assert given == GateSettings(stability_min=0.5, cull_error_count=7)
    assert isinstance(given.cull_error_count, int)
    assert GateSettings.of({}) == GateSettings()


def test_a_threshold_of_an_unknown_name_is_refused() -> None:
    with pytest.raises(TypeError, match="steadiness"):
        GateSettings.of({"steadiness": 0.5})


# ---- budgets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("value", [-1, 2.5, math.nan, math.inf, -math.inf, UNLIMITED + 1])
def test_a_budget_that_cannot_be_used_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Budgets(**{name: value})
    assert caught.value.message == f"budget {name} is {value}"
    assert str(UNLIMITED) in caught.value.hint


def test_a_budget_of_nothing_is_refused_but_no_embargo_is_not() -> None:
    for name in BUDGETS[:-1]:
        with pytest.raises(ConfigError, match=f"budget {name} is 0"):
            Budgets(**{name: 0})
    assert Budgets(embargo_epochs=0) == Budgets()


def test_budgets_are_unlimited_unless_given() -> None:
    assert [getattr(Budgets(), name) for name in BUDGETS] == [UNLIMITED] * 4 + [0]
    assert np.iinfo(np.int32).max == UNLIMITED


# ---- minima ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1, 2**31, 2.5, math.nan, math.inf, -math.inf])
def test_a_minimum_that_cannot_be_used_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        LifecycleManager(minimum_epochs={S.TRAINING: value})
    assert "TRAINING" in caught.value.message
    assert f"cannot be {value} epochs" in caught.value.message
    assert caught.value.hint == "give live states 0 or more epochs in lifecycle.minimum_epochs"


@pytest.mark.parametrize("state", [*sorted(TERMINAL_STATES), 99, -1])
def test_a_minimum_of_a_state_that_nothing_leaves_is_refused(state: Any) -> None:
    with pytest.raises(ConfigError, match=r"the minimum of state .* cannot be 3 epochs"):
        LifecycleManager(minimum_epochs={state: 3})


def test_minima_are_settings_and_states_not_named_have_none() -> None:
    manager = LifecycleManager(minimum_epochs={S.TRAINING: 2})
    decided = judge(
        Row(S.TRAINING, S.GRAFTING, 2),
        Row(S.TRAINING, S.GRAFTING, 1),
        Row(S.GRAFTING, S.STABILIZATION, 0),
        manager=manager,
    )
    assert names_of(decided) == ["NONE", "TOO_EARLY", "NONE"]


def test_a_manager_starts_from_the_default_minima_and_owns_its_copy() -> None:
    manager = LifecycleManager()
    assert manager.minimum_epochs == MINIMUM_EPOCHS
    assert manager.minimum_epochs is not LifecycleManager().minimum_epochs
