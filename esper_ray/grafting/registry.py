"""The one list of grafting strategies, by number and by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from esper_ray.errors import ConfigError
from esper_ray.grafting.memory import COLUMNS

if TYPE_CHECKING:
    from esper_ray.grafting.base import GraftingStrategyBase

    Kind = TypeVar("Kind", bound=type[GraftingStrategyBase])

STRATEGIES: Final[dict[int, type[GraftingStrategyBase]]] = {}
"""Every registered strategy by its number; `register_strategy` fills it."""

_HIGHEST_ID: Final = 127  # the Phase 1 export keeps the number in an int8


def register_strategy(kind: Kind) -> Kind:
    """Class decorator: from now on rows and settings may name this strategy."""
    if not 0 <= kind.strategy_id <= _HIGHEST_ID:
        raise ValueError(f"strategy_id must be in 0..{_HIGHEST_ID}, got {kind.strategy_id}")
    if kind.strategy_id in STRATEGIES or kind.name in strategy_names():
        raise ValueError(f"strategy {kind.strategy_id} {kind.name!r} is registered already")
    if unknown := set(kind.memory) - set(COLUMNS):
        raise ValueError(f"strategy {kind.name!r} keeps unknown columns: {sorted(unknown)}")
    STRATEGIES[kind.strategy_id] = kind
    return kind


def strategy_names() -> tuple[str, ...]:
    """Names of all registered strategies, ordered by number."""
    return tuple(kind.name for _, kind in sorted(STRATEGIES.items()))


def unknown_strategies(numbers: NDArray[np.int32]) -> NDArray[np.bool_]:
    """(rows,) True where no strategy has that number; -1, none given, is fine."""
    given = np.not_equal(numbers, -1)
    return given & ~np.isin(numbers, list(STRATEGIES)) if np.count_nonzero(given) else given


def strategy_id(name: str) -> int:
    """Number of the strategy of that name; ConfigError lists the known ones."""
    for number, kind in STRATEGIES.items():
        if kind.name == name:
            return number
    raise _unknown(name)


def strategy_name(number: int) -> str:
    """Name of the strategy of that number; ConfigError lists the known ones."""
    if number not in STRATEGIES:
        raise _unknown(number)
    return STRATEGIES[number].name


def _unknown(asked: str | int) -> ConfigError:
    what = "named" if isinstance(asked, str) else "numbered"
    known = ", ".join(strategy_names())
    return ConfigError(f"no grafting strategy is {what} {asked!r}", f"choose one of: {known}")
