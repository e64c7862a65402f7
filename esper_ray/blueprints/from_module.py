"""A blueprint made from a user's own nn.Module, computed for all seeds at once by torch.func."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from threading import RLock
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from esper_ray.blueprints.module_trial import build, examine, require_shape
from esper_ray.blueprints.registry import (
    Blueprint,
    BlueprintShape,
    WeightSpec,
    blueprint,
    register_blueprint,
)
from esper_ray.keyed_random import stream_key

Tensors = Mapping[str, Tensor]
Factory = TypeVar("Factory", bound=Callable[[BlueprintShape], nn.Module])


def register_module_blueprint(
    name: str,
    blueprint_id: int,
    *,
    reads: Literal["chunk", "input", "both"] = "chunk",
    residual: bool = True,
    zero: str | Iterable[str] = (),
) -> Callable[[Factory], Factory]:
    """Decorator of a function from BlueprintShape to the nn.Module of one seed, or of its class.

    See ModuleBlueprint for what each word means; name and number must both be new.
    """
    zero = (zero,) if isinstance(zero, str) else tuple(zero)
    chosen = {"reads": reads, "residual": residual, "zero": zero}

    def register(factory: Factory) -> Factory:
        members = {
            **{"name": name, "blueprint_id": blueprint_id, **chosen},
            "module": lambda self, shape: factory(shape),  # noqa: ARG005 - called as a method
            "__module__": getattr(factory, "__module__", __name__),
            "__doc__": factory.__doc__,
        }
        called = getattr(factory, "__name__", name)
        register_blueprint(type(called, (ModuleBlueprint,), members))
        return factory

    return register


class ModuleBlueprint(Blueprint):
    """What `module` builds, one per seed, with the weights of all seeds stacked.

    The module's forward takes what `reads` names, the chunk x (samples, chunk), the host's input
    u (samples, inputs) or both in this order, and returns (samples, chunk). All dimensions of the
    layer's output but that of features are samples, tokens too. `zero` names parameters, or
    submodules with all of theirs, that are zero at birth. A seed is born with what `module`
    draws from torch's CPU generator, started from the seed's own key. The module is in training
    mode always; one that no seed could grow is a ConfigError where it is first asked for.
    """

    residual = True
    zero: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self._patterns: dict[BlueprintShape, nn.Module] = {}
        self._constants: dict[tuple[BlueprintShape, torch.device, torch.dtype], Tensors] = {}
        self._lock = RLock()

    def __reduce__(self) -> tuple[Callable[[str], Blueprint], tuple[str]]:
        return blueprint, (self.name,)

    @abstractmethod
    def module(self, shape: BlueprintShape) -> nn.Module:
        """A new module of one seed."""

    def weights(self, shape: BlueprintShape) -> Mapping[str, WeightSpec]:
        """The module's parameters; ConfigError where it cannot be one seed of many."""
        named = self._pattern(shape).named_parameters()
        return {_stored(shape, name): WeightSpec(tuple(p.shape)) for name, p in named}

    def newborn(self, shape: BlueprintShape, identity: Tensor, stream: str) -> Tensors:
        """A module is built for each row: births are rare."""
        names = [name for name, _ in self._pattern(shape).named_parameters()]
        keys = [stream_key(stream, self.name, number) for number in identity.tolist()]
        born = [dict(build(self, shape, key).named_parameters()) for key in keys]
        if not born:
            return {}
        return {_stored(shape, n): torch.stack([own[n].detach() for own in born]) for n in names}

    def forward(self, weights: Tensors, x: Tensor, u: Tensor) -> Tensor:
        """Every row by a module of its own weights."""
        shape = _shape_of(weights)
        pattern = self._pattern(shape)
        own = {name: weights[_stored(shape, name)] for name, _ in pattern.named_parameters()}
        constants = self._constants_as(shape, next(iter(own.values())))
        return self.together(pattern, own, constants, x, u)

    def together(
        self, pattern: nn.Module, own: Tensors, constants: Tensors, x: Tensor, u: Tensor
    ) -> Tensor:
        """What modules like `pattern`, with parameters `own` (rows, ...), make of x and u."""
        if x.shape[-2] == 0:  # torch cannot batch over nobody
            return torch.zeros_like(x)

        def one(own: Tensors, x: Tensor) -> Tensor:
            out = functional_call(pattern, {**own, **constants}, self._arguments(x, u))
            return require_shape(self, out, x)

        with self._lock:  # functional_call swaps the weights of `pattern` for the time of a call
            rows: Tensor = vmap(one, in_dims=(0, -2))(own, x)
        return rows.movedim(0, -2)  # not out_dims: torch 2.13 crashes where no output is batched

    def alone(self, module: nn.Module, x: Tensor, u: Tensor) -> Tensor:
        """What the module of one seed makes of its chunk x (..., chunk) and of u."""
        return require_shape(self, module(*self._arguments(x, u)), x)

    def _arguments(self, x: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        return {"chunk": (x,), "input": (u,), "both": (x, u)}[self.reads]

    def _pattern(self, shape: BlueprintShape) -> nn.Module:
        self.require_input(shape)
        with self._lock:
            if shape not in self._patterns:
                self._patterns[shape] = examine(self, shape)
            return self._patterns[shape]

    def _constants_as(self, shape: BlueprintShape, weight: Tensor) -> Tensors:
        """The buffers of the module, where and in the precision that `weight` is."""
        place = (shape, weight.device, weight.dtype)
        if place not in self._constants:  # copied once: a copy in each step would wait for the GPU
            self._constants[place] = {
                name: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
                for name, value in self._pattern(shape).named_buffers()
            }
        return self._constants[place]


def _stored(shape: BlueprintShape, name: str) -> str:
    """Name of a parameter in a bank, which takes no dots.

    It starts with the sizes, which need not show in the weights: a number of heads, say.
    """
    return f"{shape.chunk}x{shape.hidden}x{shape.inputs}/{name.replace('.', '/')}"


def _shape_of(weights: Tensors) -> BlueprintShape:
    return BlueprintShape(*map(int, next(iter(weights)).partition("/")[0].split("x")))
