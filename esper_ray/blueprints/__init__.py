"""What a seed can grow: modules whose weights are stacked over all seeds of a layer."""

from esper_ray.blueprints.builtin import AutoencoderBlueprint, BottleneckBlueprint
from esper_ray.blueprints.registry import (
    Blueprint,
    BlueprintShape,
    WeightSpec,
    blueprint,
    blueprint_names,
    register_blueprint,
)

__all__ = [
    "AutoencoderBlueprint",
    "Blueprint",
    "BlueprintShape",
    "BottleneckBlueprint",
    "WeightSpec",
    "blueprint",
    "blueprint_names",
    "register_blueprint",
]
