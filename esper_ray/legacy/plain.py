"""Values without code: checked, written as JSON beside named tensors, and read again."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from esper_ray.errors import CorruptError, UnsafeInputError

MAX_DEPTH: Final = 16
MAX_VALUES: Final = 100_000
MAX_TEXT: Final = 64 * 1024
MAX_TENSOR_BYTES: Final = 256 * 2**20

_DICTS = (dict, OrderedDict)
_TENSORS = (Tensor, torch.nn.Parameter)


class Packing:
    """Turns a value into JSON and named tensors; UnsafeInputError for anything but plain ones."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._values = self._bytes = 0

    def pack(self, value: Any, depth: int = 0) -> Any:
        """JSON of a value, in which a list says what it stands for."""
        self._values += 1
        if depth > MAX_DEPTH or self._values > MAX_VALUES:
            raise UnsafeInputError(
                f"it is nested more than {MAX_DEPTH} deep or holds more than {MAX_VALUES} values"
            )
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind is int:
            if not -(2**63) <= value < 2**63:
                raise UnsafeInputError("it holds a number beyond 64 bits")
            return value
        if kind in (str, TorchVersion):
            return _text(value)
        if kind is float:
            return ["float", repr(value)]
        if kind is list:
            return ["list", [self.pack(inside, depth + 1) for inside in value]]
        if kind in _DICTS:
            return ["dict", [self._item(k, v, depth + 1) for k, v in value.items()]]
        if kind in _TENSORS:
            return ["tensor", self._keep(value.detach())]
        raise UnsafeInputError(
            f"it holds a {kind.__module__}.{kind.__qualname__}",
            "only tensors, text, numbers, None, lists and dicts of them are imported",
        )

    def _item(self, key: object, value: object, depth: int) -> list[Any]:
        if type(key) not in (str, int):
            raise UnsafeInputError(f"it has a key of type {type(key).__name__}")
        return [self.pack(key, depth), self.pack(value, depth)]

    def _keep(self, tensor: Tensor) -> str:
        self._bytes += check_tensor(tensor)
        if self._bytes > MAX_TENSOR_BYTES:
            raise UnsafeInputError(f"its tensors have more than {MAX_TENSOR_BYTES} bytes")
        name = f"t{len(self.tensors):06d}"
        self.tensors[name] = tensor
        return name


def _text(value: str) -> str:
    text = str(value)
    if len(text) > MAX_TEXT or not text.isprintable():
        raise UnsafeInputError(f"it holds the text {text[:40]!r}, which is long or not printable")
    return text


def check_tensor(tensor: Tensor) -> int:
    """Bytes of a plain dense tensor; UnsafeInputError for one that its storage cannot fill."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise UnsafeInputError(f"it holds a {tensor.layout} tensor on {tensor.device}")
    size = math.prod(tensor.shape) * tensor.element_size()
    if any(n > 1 and step <= 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True)):
        raise UnsafeInputError(f"it holds a tensor of stride 0 and shape {tuple(tensor.shape)}")
    if size > tensor.untyped_storage().nbytes():
        raise UnsafeInputError(
            f"it holds a tensor of {size} bytes in a storage of {tensor.untyped_storage().nbytes()}"
        )
    return size


def to_json(value: Any) -> bytes:
    """A packed value as bytes."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False).encode()


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack`; CorruptError for any other JSON."""
    if not isinstance(value, list | dict):
        return value
    try:
        kind, inside = value
        if kind == "float":
            return float(inside)
        if kind == "list":
            return [unpack(item, tensors) for item in inside]
        if kind == "dict":
            return {unpack(key, tensors): unpack(item, tensors) for key, item in inside}
        if kind == "tensor":
            return tensors[inside]
    except (TypeError, ValueError, KeyError) as error:
        raise CorruptError(f"an unpacked record cannot be read: {error!r}") from error
    raise CorruptError(f"an unpacked record has a value of kind {kind!r}")
