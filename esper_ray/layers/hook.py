"""Seeds attached to a module of any model, which keeps its class, its names and its place."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn

from esper_ray.errors import ConfigError
from esper_ray.layers.layer_seeds import LayerSeeds

CHILD: Final = "esper_seeds"


@dataclass(frozen=True, slots=True)
class Output:
    """Which tensor of a module's output carries the seeds, and which of its dimensions is cut.

    `part` is an index of a tuple or list, or a key of a mapping; None for a plain tensor.
    """

    part: int | str | None = None
    feature_dim: int = -1

    def find(self, output: Any) -> Tensor:
        """The tensor, features last; ConfigError where there is none."""
        try:
            found = output if self.part is None else output[self.part]
        except (KeyError, IndexError, TypeError) as error:
            raise ConfigError(
                f"the output, {type(output).__name__}, has no part {self.part!r}",
                "name an index of a tuple or a key of a mapping",
            ) from error
        if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim < 2:
            raise ConfigError(
                f"a {_described(found)} has no feature dimension for seeds to divide",
                "target a module that puts out a float tensor (samples, ..., features), or name "
                "the part of its output that is one",
            )
        return _features_last(found, self.feature_dim)

    def replace(self, output: Any, found: Tensor) -> Any:
        """The output with the tensor, features last, in its place."""
        blended = found if self.feature_dim == -1 else found.movedim(-1, self.feature_dim)
        if self.part is None:
            return blended
        if isinstance(output, tuple):
            parts = list(output)
            parts[int(self.part)] = blended
            return output._make(parts) if hasattr(output, "_make") else type(output)(parts)
        changed = copy.copy(output)
        changed[self.part] = blended
        return changed


@dataclass(frozen=True, slots=True)
class SeedHook:
    """A forward hook that blends the module's seeds into its output.

    It finds the seeds by the module it is called with, so that a copy of a model runs its own.
    """

    output: Output

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        """The output with the seeds blended in; itself while none is."""
        seeds = module.get_submodule(CHILD)
        if not isinstance(seeds, LayerSeeds):
            raise TypeError(f"{CHILD} is a {type(seeds).__name__}")
        h = self.output.find(output)
        alone = len(module._forward_hooks) == 1  # another hook may have kept the output
        y = seeds.blend(h, self._read(args, kwargs, h), in_place=alone and seeds.in_place)
        if y is h and self.output.feature_dim == -1:  # nothing was blended in
            return output
        return self.output.replace(output, y)

    def _read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], h: Tensor) -> Tensor | None:
        u = host_input(args, kwargs)
        if u is None:
            return None
        u = _features_last(u, self.output.feature_dim)
        return u if u.shape[:-1] == h.shape[:-1] else None


def _features_last(x: Tensor, feature_dim: int) -> Tensor:
    """x itself where it is so already: a view would have a gradient of its own."""
    return x if feature_dim == -1 else x.movedim(feature_dim, -1)


def host_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first float tensor that a module was called with, of two dimensions at least."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1:
            return value
    return None


FRESH_OUTPUT: Final = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules whose output nobody else holds, and whose backward does not look at it."""


def attach_seeds(module: nn.Module, seeds: LayerSeeds, output: Output = Output()) -> LayerSeeds:
    """Give `module` seeds, as its child `esper_seeds`; ConfigError if it has some.

    On a GPU they write into the output of a module of FRESH_OUTPUT that has no other hook.
    """
    if hasattr(module, CHILD):
        raise ConfigError(
            f"layer {seeds.layer_id!r} carries seeds already", "detach them before attaching others"
        )
    seeds.in_place = _last(module) in FRESH_OUTPUT and output.part is None
    module.add_module(CHILD, seeds)
    module.register_forward_hook(SeedHook(output), with_kwargs=True)
    return seeds


def output_of_seeds(module: nn.Module) -> Output:
    """What of a module's output its seeds are blended into; ConfigError if it carries none."""
    for hook in module._forward_hooks.values():
        if isinstance(hook, SeedHook):
            return hook.output
    raise ConfigError(f"a {type(module).__name__} carries no seeds", "attach some first")


def detach_seeds(module: nn.Module) -> None:
    """Take the seeds and their hook away; the host is as trained."""
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, SeedHook):
            module._forward_hooks.pop(key)
            module._forward_hooks_with_kwargs.pop(key, None)
    delattr(module, CHILD)


def _last(module: nn.Module) -> type[nn.Module]:
    """Class of what puts out the module's output, as far as that can be known."""
    if type(module) is nn.Sequential and len(module):
        return _last(module[-1])
    return type(module)


def _described(found: object) -> str:
    if isinstance(found, Tensor):
        return f"{found.ndim}-dimensional tensor of {str(found.dtype).removeprefix('torch.')}"
    return type(found).__name__
