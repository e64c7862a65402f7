"""What the keys of a configuration mean to the parts that do the work."""

from __future__ import annotations

from esper_ray.blueprints import blueprint
from esper_ray.config.schema import LifecycleConfig, SeedsConfig
from esper_ray.grafting import GraftingSettings, SelectorSettings, strategy_id
from esper_ray.growth.objectives import objective
from esper_ray.growth.slot_adam import SlotAdamSettings
from esper_ray.growth.spec import SeedSpec
from esper_ray.lifecycle import Budgets, GateSettings, LifecycleManager
from esper_ray.policy import PolicySettings


def seed_spec(seeds: SeedsConfig) -> SeedSpec:
    """How seeds grow; ConfigError where objective and blueprint do not fit."""
    objective(seeds.objective, blueprint(seeds.blueprint))
    return SeedSpec(
        blueprint=seeds.blueprint,
        hidden=seeds.hidden,
        objective=seeds.objective,
        k=seeds.gradient_step,
        optimizer=SlotAdamSettings(lr=seeds.lr, warmup_steps=seeds.warmup_steps),
        grafting=grafting_settings(seeds),
        drift_unit=seeds.grafting.drift_unit,
    )


def grafting_settings(seeds: SeedsConfig) -> GraftingSettings:
    """How alpha rises."""
    values = seeds.grafting.model_dump(exclude={"strategy", "drift_unit", "selection"})
    chosen = seeds.grafting.selection.model_dump()
    chosen |= {"arms": tuple(chosen["arms"]), "strategy": seeds.grafting.strategy}
    return GraftingSettings(**values, selection=SelectorSettings(**chosen))


def policy_settings(seeds: SeedsConfig, lifecycle: LifecycleConfig) -> PolicySettings:
    """When seeds are planted and when waiting ends."""
    return PolicySettings(
        objective=seeds.objective,
        blueprint_id=blueprint(seeds.blueprint).blueprint_id,
        strategy_id=strategy_id(seeds.grafting.strategy),
        ramp_epochs=seeds.grafting.ramp_epochs,
        germinate_after=lifecycle.germinate_after,
        max_growing=lifecycle.max_growing,
        training_timeout=lifecycle.training_timeout,
        fine_tuning_timeout=lifecycle.fine_tuning_timeout,
        error_limit=lifecycle.error_limit,
        strategies_switch=seeds.grafting.selection.mode == "performance",
    )


def lifecycle_manager(lifecycle: LifecycleConfig) -> LifecycleManager:
    """Gates, minima, budgets."""
    limits = lifecycle.budgets.model_dump(exclude_none=True)
    return LifecycleManager(
        gates=GateSettings.of(lifecycle.gates),
        minimum_epochs=lifecycle.minima(),
        budgets=Budgets(**limits, embargo_epochs=lifecycle.embargo_epochs),
        replanting=lifecycle.replanting,
    )
