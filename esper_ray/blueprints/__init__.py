"""What a seed can grow: modules whose weights are stacked over all seeds of a layer."""

from esper_ray.blueprints.builtin import (
    AffineBlueprint,
    AutoencoderBlueprint,
    BottleneckBlueprint,
    InputChunkMlpBlueprint,
    InputMlpBlueprint,
    LowRankBlueprint,
)
from esper_ray.blueprints.from_module import ModuleBlueprint, register_module_blueprint
from esper_ray.blueprints.registry import (
    Blueprint,
    BlueprintShape,
    WeightSpec,
    blueprint,
    blueprint_names,
    register_blueprint,
)

__all__ = [
    "AffineBlueprint",
    "AutoencoderBlueprint",
    "Blueprint",
    "BlueprintShape",
    "BottleneckBlueprint",
    "InputChunkMlpBlueprint",
    "InputMlpBlueprint",
    "LowRankBlueprint",
    "ModuleBlueprint",
    "WeightSpec",
    "blueprint",
    "blueprint_names",
    "register_blueprint",
    "register_module_blueprint",
]
