"""How alpha rises while a seed is blended in."""

from esper_ray.grafting.strategies import (
    DriftControlledGrafting,
    GraftingColumns,
    GraftingSettings,
    GraftingStrategyBase,
    LinearGrafting,
    advance_alpha,
    strategy_id,
)

__all__ = [
    "DriftControlledGrafting",
    "GraftingColumns",
    "GraftingSettings",
    "GraftingStrategyBase",
    "LinearGrafting",
    "advance_alpha",
    "strategy_id",
]
