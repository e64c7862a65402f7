"""A torch optimiser's state as JSON values and named tensors, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from esper_ray.errors import ConfigError, CorruptError

Tensors = dict[str, Tensor]
_PREFIX = "optimizer"


def to_plain(optimizer: Optimizer) -> tuple[Any, Tensors]:
    """JSON values, and the tensors that they name; ConfigError for a state of another kind."""
    tensors: Tensors = {}
    state = optimizer.state_dict()
    kept = {key: state[key] for key in ("state", "param_groups")}
    return _plain(kept, _PREFIX, tensors), tensors


def _plain(value: Any, name: str, tensors: Tensors) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu()
        return {"tensor": name}
    if isinstance(value, dict):
        items = [[_key(k), _plain(v, f"{name}/{k}", tensors)] for k, v in value.items()]
        return {"items": items}
    if isinstance(value, list | tuple):
        parts = [_plain(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]
        return {type(value).__name__ if type(value) in (list, tuple) else "list": parts}
    if isinstance(value, float):
        return {"float": repr(float(value))}
    if value is None or isinstance(value, bool | int | str):
        return value
    raise ConfigError(
        f"the optimizer keeps a {type(value).__name__} in {name}, which cannot be stored",
        "attach without the optimizer and store its state yourself",
    )


def _key(key: object) -> int | str:
    if isinstance(key, int | str):
        return key
    raise ConfigError(f"the optimizer has a key of type {type(key).__name__}, not text or number")


def load_plain(optimizer: Optimizer, plain: Any, tensors: Tensors) -> None:
    """The inverse of `to_plain`; ConfigError where the optimizer has other parameters."""
    try:
        state = _value(plain, tensors)
        optimizer.load_state_dict(state)
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"the optimizer's state cannot be read: {error!r}") from error
    except ValueError as error:
        raise ConfigError(
            f"the stored optimizer differs from the one given: {error}",
            "give one of the same class with the same parameters in the same groups",
        ) from error


def _value(plain: Any, tensors: Tensors) -> Any:
    if not isinstance(plain, dict):
        return plain
    ((kind, inside),) = plain.items()
    match kind:
        case "tensor":
            return torch.clone(tensors[inside])
        case "items":
            return {key: _value(value, tensors) for key, value in inside}
        case "list":
            return [_value(value, tensors) for value in inside]
        case "tuple":
            return tuple(_value(value, tensors) for value in inside)
        case "float":
            return float(inside)
    raise TypeError(f"{kind!r} is no kind of value")
