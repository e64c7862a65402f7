"""Budgets: how many seeds of a run are in a state at once, and that all have their turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from esper_ray.config import RunConfig
from esper_ray.events.messages import EpochReport
from tests.runs.history import assert_log_replays, grow

ConfigMaker = Callable[..., RunConfig]


def most(reports: list[EpochReport], state: str) -> tuple[int, int]:
    """Largest number of seeds in a state after any epoch: of one layer, and of all."""
    counts = [[seeds.get(state, 0) for seeds in report.seeds.values()] for report in reports]
    return max(max(layers) for layers in counts), max(sum(layers) for layers in counts)


def reached(reports: list[EpochReport], state: str) -> Counter[str]:
    """Seeds by layer that have entered a state."""
    return Counter(
        layer for report in reports for layer, _, _, target in report.moves if target == state
    )


def test_two_seeds_train_at_a_time_and_all_have_their_turn(make_config: ConfigMaker) -> None:
    config = make_config(lifecycle__budgets={"training_in_all": 2}, train__epochs=48)
    log, plan, reports = grow(config)
    assert most(reports, "TRAINING") == (1, 2)  # the layer with fewer goes first
    for state in ("TRAINING", "FOSSILIZED"):
        assert reached(reports, state) == {"reader.hidden": 4, "predictor.hidden": 4}
    assert_log_replays(log, plan)


@pytest.mark.parametrize(
    ("budgets", "expected"),
    [
        ({"training_per_layer": 1}, {"TRAINING": (1, 2)}),
        ({"training_per_layer": 3, "training_in_all": 5}, {"TRAINING": (3, 5)}),
        ({"grafting_in_all": 3}, {"TRAINING": (4, 8), "GRAFTING": (2, 3)}),
        ({"grafting_per_layer": 1}, {"TRAINING": (4, 8), "GRAFTING": (1, 2)}),
        ({}, {"TRAINING": (4, 8), "GRAFTING": (4, 8)}),
    ],
)
def test_no_state_ever_holds_more_seeds_than_its_budget(
    make_config: ConfigMaker,
    budgets: dict[str, int],
    expected: dict[str, tuple[int, int]],
) -> None:
    _, _, reports = grow(make_config(lifecycle__budgets=budgets, train__epochs=22))
    assert {state: most(reports, state) for state in expected} == expected
