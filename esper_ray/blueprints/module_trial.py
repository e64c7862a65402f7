"""Whether a user's module can be one seed of many: built and tried before a run starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from esper_ray.blueprints.registry import BlueprintShape
from esper_ray.errors import ConfigError, EsperError

if TYPE_CHECKING:
    from esper_ray.blueprints.from_module import ModuleBlueprint

_SAMPLES: Final = 16
_ROWS: Final = 2


def build(kind: ModuleBlueprint, shape: BlueprintShape, key: int) -> nn.Module:
    """The module of one newborn seed, drawn from `key`; leaves torch's generators alone."""
    where = f"{kind.__class__.__module__}.{kind.__class__.__qualname__}"
    with _users_code(
        f"blueprint {kind.name!r}: {where} cannot build a module for {shape}",
        "return an nn.Module that fits shape.chunk, shape.hidden and shape.inputs",
    ):
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(key)
            module = kind.module(shape)
        if not isinstance(module, nn.Module):
            raise TypeError(f"it returned {type(module).__name__}")
    _set_to_zero(kind, module)
    return module


def require_shape(kind: ModuleBlueprint, out: object, x: Tensor) -> Tensor:
    """`out` if it is shaped as the chunk x; nothing is broadcast."""
    if isinstance(out, Tensor) and out.shape == x.shape:
        return out
    got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
    raise ConfigError(
        f"the module of blueprint {kind.name!r} returns {got} for a chunk of {tuple(x.shape)}",
        "return one tensor of the chunk's shape, (samples, shape.chunk)",
    )


def examine(kind: ModuleBlueprint, shape: BlueprintShape) -> nn.Module:
    """A module of that shape, with what is asked of it found true; ConfigError names the rest."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
        pattern, twin, other = (build(kind, shape, key) for key in (0, 0, 1))
        _check_parameters(kind, pattern)
        _check_draws(kind, pattern, twin, other)
        x, u = _check_alone(kind, twin, shape)
        _check_together(kind, pattern, x, u)
    return pattern


@contextmanager
def _users_code(failure: str, hint: str) -> Iterator[None]:
    try:
        yield
    except EsperError:
        raise
    except Exception as error:  # it is not ours, so it may raise anything
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigError(f"{failure}: {said}", hint) from error


@torch.no_grad()
def _set_to_zero(kind: ModuleBlueprint, module: nn.Module) -> None:
    named = dict(module.named_parameters(remove_duplicate=False))
    for wanted in kind.zero:
        found = [p for name, p in named.items() if f"{name}.".startswith(f"{wanted}.")]
        if not found:
            raise ConfigError(
                f"blueprint {kind.name!r}: zero names {wanted!r}, which its module has not",
                f"its parameters are: {', '.join(named)}",
            )
        for parameter in found:
            if not is_lazy(parameter):
                parameter.zero_()


def _check_parameters(kind: ModuleBlueprint, module: nn.Module) -> None:
    named = dict(module.named_parameters())
    if not named:
        raise ConfigError(
            f"the module of blueprint {kind.name!r} has no parameters, so a seed learns nothing",
            "register what it learns as nn.Parameter or in submodules",
        )
    for name, value in (*named.items(), *module.named_buffers()):
        if is_lazy(value):
            raise _unfit(kind, name, "has no size yet", "take sizes from the BlueprintShape")
    for name, parameter in named.items():
        if not parameter.is_floating_point():
            kept = str(parameter.dtype).removeprefix("torch.")
            raise _unfit(kind, name, f"is {kept}", "make it a float, or a buffer if it is constant")
        if not parameter.requires_grad:
            raise _unfit(kind, name, "is frozen", "make what is constant a buffer")
        if "/" in name:
            raise _unfit(kind, name, "has a / in its name", "use another name")


def _check_draws(
    kind: ModuleBlueprint, module: nn.Module, twin: nn.Module, other: nn.Module
) -> None:
    """`twin` has the same key and all values, `other` has another and the same buffers."""
    mine, twins, others = map(_tensors, (module, twin, other))
    if not _form(mine) == _form(twins) == _form(others):
        raise ConfigError(
            f"the module of blueprint {kind.name!r} has other parameters at every birth",
            "let its form follow from the BlueprintShape alone",
        )
    shared = dict(module.named_buffers())
    for name, value in mine.items():
        if not _same(value, twins[name]):
            remedy = "draw initial values from torch's default generator only"
            raise _unfit(kind, name, "differs between two births of one key", remedy)
        if name in shared and not _same(value, others[name]):
            remedy = "make it a parameter, or compute it from the BlueprintShape"
            raise _unfit(kind, name, "is random, but seeds share their buffers", remedy)


def _check_alone(
    kind: ModuleBlueprint, module: nn.Module, shape: BlueprintShape
) -> tuple[Tensor, Tensor]:
    """Chunks of some seeds and an input that the module reads without changing its buffers."""
    before = {name: value.clone() for name, value in module.named_buffers()}
    x, u = _noise(_SAMPLES, _ROWS, shape.chunk), _noise(_SAMPLES, shape.inputs)
    chunk, read = f"a chunk of {(_SAMPLES, shape.chunk)}", f"an input of {(_SAMPLES, shape.inputs)}"
    with _users_code(
        f"the module of blueprint {kind.name!r}, which reads {kind.reads!r}, fails for "
        + (f"{chunk} and {read}" if kind.reads_input() else chunk),
        "let its forward take what it reads, (samples, features): tokens are samples too",
    ):
        kind.alone(module, x[..., 0, :], u)
    for name, value in module.named_buffers():
        if not _same(value, before[name]):
            remedy = "leave it out: a BatchNorm needs track_running_stats=False"
            raise _unfit(kind, name, "changes in forward, but seeds share buffers", remedy)
    return x, u


def _check_together(kind: ModuleBlueprint, module: nn.Module, x: Tensor, u: Tensor) -> None:
    own = {
        name: torch.stack([value.detach()] * _ROWS).requires_grad_()
        for name, value in module.named_parameters()
    }
    with _users_code(
        f"the module of blueprint {kind.name!r} cannot be computed for all seeds at once",
        "leave out dropout and other random numbers, and branches on the values of tensors",
    ):
        out = kind.together(module, own, dict(module.named_buffers()), x, u)
        if out.requires_grad:
            (out * _noise(*out.shape)).sum().backward()  # type: ignore[no-untyped-call]
    if kind.residual and out.any():
        raise ConfigError(
            f"blueprint {kind.name!r} is residual, but its module does not return zeros at birth: "
            f"up to {out.abs().max().item():.3g}",
            "name its last layer in zero=, or say residual=False if it is to replace the chunk",
        )
    if not any(value.grad is not None and value.grad.any() for value in own.values()):
        raise ConfigError(
            f"no gradient reaches a newborn module of blueprint {kind.name!r}, so it cannot learn",
            "let zero= name one layer only, the last, and return what the parameters compute",
        )


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict((*module.named_parameters(), *module.named_buffers()))


def _form(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in tensors.items()}


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | one.isnan()).all())


def _unfit(kind: ModuleBlueprint, name: str, what: str, hint: str) -> ConfigError:
    return ConfigError(f"{name!r} in the module of blueprint {kind.name!r} {what}", hint)
