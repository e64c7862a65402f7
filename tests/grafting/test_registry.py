"""A strategy is known by its number and its name, both unique."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

from esper_ray.errors import ConfigError
from esper_ray.grafting import (
    STRATEGIES,
    GraftingRows,
    GraftingStrategyBase,
    register_strategy,
    strategy_id,
    strategy_name,
    strategy_names,
)
from esper_ray.grafting.base import Floats


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = dict(STRATEGIES)
    yield
    assert before == STRATEGIES


def kind(number: int, called: str, columns: tuple[str, ...] = ()) -> type[GraftingStrategyBase]:
    class Flat(GraftingStrategyBase):
        strategy_id = number
        name = called
        memory = columns

        def propose(self, epoch: int, total: int, metrics: Mapping[str, float]) -> float:
            raise NotImplementedError

        def advance(self, rows: GraftingRows) -> Floats:
            raise NotImplementedError

    return Flat


def test_names_and_numbers_are_those_of_the_design() -> None:
    names = ("linear", "drift_controlled", "momentum", "adaptive", "stability")
    assert strategy_names() == names
    assert [strategy_id(name) for name in names] == [0, 1, 2, 3, 4]
    assert [strategy_name(number) for number in range(5)] == list(names)


def test_an_unknown_name_or_number_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="named 'cubic'") as error:
        strategy_id("cubic")
    assert "linear, drift_controlled" in error.value.hint
    with pytest.raises(ConfigError, match="numbered 99"):
        strategy_name(99)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (kind(-1, "flat"), r"in 0\.\.127, got -1"),
        (kind(128, "flat"), r"in 0\.\.127, got 128"),
        (kind(0, "flat"), "0 'flat' is registered already"),
        (kind(100, "linear"), "100 'linear' is registered already"),
        (kind(100, "flat", ("pause", "mood")), r"unknown columns: \['mood'\]"),
    ],
)
def test_a_strategy_that_does_not_fit_is_refused(
    refused: type[GraftingStrategyBase], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        register_strategy(refused)


def test_a_registered_strategy_is_found() -> None:
    flat = register_strategy(kind(127, "flat"))
    assert (strategy_id("flat"), strategy_name(127)) == (127, "flat")
    assert STRATEGIES.pop(127) is flat
