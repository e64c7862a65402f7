"""What a user says of the seeds of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from esper_ray.errors import ConfigError
from esper_ray.grafting import GraftingSettings, strategy_id
from esper_ray.growth.slot_adam import SlotAdamSettings
from esper_ray.growth.spec import SeedSpec
from esper_ray.layers import Output
from esper_ray.lifecycle import LifecycleManager
from esper_ray.policy import PolicySettings

Target = str | type[nn.Module] | Callable[[str, nn.Module], bool]
"""A pattern for a module's name, a class, or a question about (name, module)."""


@dataclass(frozen=True, slots=True)
class SeedConfig:
    """Which modules carry seeds, how many, and how they grow.

    Every target must match. `epoch_steps` steps make a lifecycle epoch. Blueprint "auto" is
    `input_mlp` where seeds can read the host's input, else `bottleneck`. `output` says which part
    of the modules' output is meant, and which dimension holds features; by default what their
    class tells, else the last.
    """

    targets: Sequence[Target]
    exclude: Sequence[Target] = ()
    seeds_per_layer: int = 16
    epoch_steps: int = 100
    blueprint: str = "auto"
    hidden: int = 32
    objective: str = "gradient_target"
    k: float = 0.3
    seed_lr: float = 2e-3
    warmup_steps: int = 10
    strategy: str = "drift_controlled"
    grafting: GraftingSettings = field(default_factory=GraftingSettings)
    policy: PolicySettings = field(default_factory=PolicySettings)
    manager: LifecycleManager = field(default_factory=LifecycleManager)
    output: Output | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("seeds_per_layer", "epoch_steps", "hidden"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} must be at least 1, got {getattr(self, name)}", f"raise {name}"
                )
        if isinstance(self.targets, str) or not self.targets:
            raise ConfigError(
                f"targets must be a list of one entry or more, got {self.targets!r}",
                'name modules, such as targets=["encoder.*.mlp"]',
            )

    def spec(self, blueprint: str) -> SeedSpec:
        """How the seeds of one layer grow."""
        return SeedSpec(
            blueprint=blueprint,
            hidden=self.hidden,
            objective=self.objective,
            k=self.k,
            optimizer=SlotAdamSettings(lr=self.seed_lr, warmup_steps=self.warmup_steps),
            grafting=self.grafting,
        )

    def rules(self, blueprint_id: int) -> PolicySettings:
        """What the policy goes by for a layer whose seeds grow that blueprint."""
        return replace(
            self.policy,
            objective=self.objective,
            blueprint_id=blueprint_id,
            strategy_id=strategy_id(self.strategy),
            ramp_epochs=self.grafting.ramp_epochs,
            strategies_switch=self.grafting.selection.mode == "performance",
        )
