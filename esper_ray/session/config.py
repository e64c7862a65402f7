"""What a session is told: which modules carry seeds, and how these grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeAlias

from pydantic import Field, ValidationError, field_validator
from torch import nn

from esper_ray.blueprints import blueprint
from esper_ray.config import LifecycleConfig
from esper_ray.config.reading import explained
from esper_ray.config.schema import AUTO, SeedsConfig
from esper_ray.config.section import NotNegative, Size
from esper_ray.errors import ConfigError
from esper_ray.growth.objectives import objective
from esper_ray.layers import Output

Selector: TypeAlias = str | type[nn.Module] | Callable[[str, nn.Module], bool]
"""A pattern of module names, a class, or a function of name and module."""

_OF_MODELS = {"targets", "exclude", "output", "width"}


class SeedConfig(SeedsConfig):
    """How seeds grow in a model that you train yourself; keys not named here as in a run file.

    ConfigError, a ValueError, where a value cannot be used.
    """

    targets: Annotated[list[Any], Field(min_length=1)]
    """Which modules carry seeds: patterns of module names, classes, or functions of name and
    module. Each must match. The name of the model itself is ""."""
    exclude: list[Any] = Field(default_factory=list)
    """Which of the matched modules carry none; written and checked like `targets`."""
    blueprint: str = AUTO
    """What a seed grows. `auto`: `input_mlp` where a Linear or an MLP shows its input, otherwise
    `bottleneck`; `autoencoder` for the objective `reconstruction`."""
    output: Output | None = None
    """Which tensor of the modules' output carries seeds, and which of its dimensions is divided;
    by default the output itself and the dimension that the module's class says, or the last."""
    width: Size | None = None
    """Features of that dimension, for modules whose class does not say."""
    lifecycle: LifecycleConfig = Field(default_factory=LifecycleConfig)
    """When seeds are planted and judged, in lifecycle epochs."""
    seed: NotNegative = 0
    """The weights of newborn seeds follow from it."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise explained(error, SeedConfig, "docs/attach.md") from error

    @field_validator("targets", "exclude")
    @classmethod
    def _selectors(cls, value: list[Any]) -> list[Any]:
        for entry in value:
            if not isinstance(entry, str) and not callable(entry):
                raise ValueError(f"{entry!r} is no pattern, class or function of name and module")
        return value

    def growing(self, name: str) -> SeedConfig:
        """The same with a blueprint of that name, which must fit the objective."""
        objective(self.objective, blueprint(name))
        return self.model_copy(update={"blueprint": name})

    def to_plain(self) -> dict[str, Any]:
        """JSON values of everything that does not speak of one model's modules."""
        return self.model_dump(mode="json", exclude=_OF_MODELS)

    @classmethod
    def from_plain(cls, values: dict[str, Any], targets: list[str]) -> SeedConfig:
        """The inverse of `to_plain` for modules of these names."""
        if _OF_MODELS & values.keys():
            raise ConfigError(f"stored settings name {sorted(_OF_MODELS & values.keys())}")
        return cls(targets=targets, **values)
