"""A model and a blueprint of its own; to import the module registers the blueprint."""

from __future__ import annotations

from torch import nn

from esper_ray.blueprints import BlueprintShape, register_module_blueprint
from esper_ray.models import StageFactory, byte_mlp


@register_module_blueprint("adapter_of_a_user", 7_001, zero="2")
def adapter(shape: BlueprintShape) -> nn.Module:
    """Chunk to hidden to chunk; fails for an odd number of hidden units, and for 14."""
    if shape.hidden % 2:
        raise AssertionError(f"{shape.hidden} is odd")
    return nn.Sequential(
        nn.Linear(shape.chunk, shape.hidden),
        nn.Tanh(),
        nn.Linear(shape.hidden, 1 if shape.hidden == 14 else shape.chunk, bias=False),
    )


def two_stages(embedding: int, hidden: int) -> list[StageFactory]:
    """The byte model."""
    return byte_mlp(embedding=embedding, hidden=hidden)
