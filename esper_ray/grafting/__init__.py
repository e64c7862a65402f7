"""How alpha rises while a seed is blended in."""

from esper_ray.grafting.advance import advance_alpha
from esper_ray.grafting.base import GraftingRows, GraftingStrategyBase
from esper_ray.grafting.memory import BIRTH, COLUMNS, GraftingMemory
from esper_ray.grafting.outcomes import Ending, StrategyOutcome, StrategyOutcomes
from esper_ray.grafting.registry import (
    STRATEGIES,
    register_strategy,
    strategy_id,
    strategy_name,
    strategy_names,
    unknown_strategies,
)
from esper_ray.grafting.selector import StrategySelector
from esper_ray.grafting.settings import GraftingSettings, SelectorSettings
from esper_ray.grafting.strategies import (
    AdaptiveGrafting,
    DriftControlledGrafting,
    LinearGrafting,
    MomentumGrafting,
    StabilityGrafting,
)

__all__ = [
    "BIRTH",
    "COLUMNS",
    "STRATEGIES",
    "AdaptiveGrafting",
    "DriftControlledGrafting",
    "Ending",
    "GraftingMemory",
    "GraftingRows",
    "GraftingSettings",
    "GraftingStrategyBase",
    "LinearGrafting",
    "MomentumGrafting",
    "SelectorSettings",
    "StabilityGrafting",
    "StrategyOutcome",
    "StrategyOutcomes",
    "StrategySelector",
    "advance_alpha",
    "register_strategy",
    "strategy_id",
    "strategy_name",
    "strategy_names",
    "unknown_strategies",
]
