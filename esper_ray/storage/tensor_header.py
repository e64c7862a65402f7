"""The header of a safetensors file, read by our own rules before anything else sees it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from esper_ray.errors import CorruptError
from esper_ray.storage.manifest import parse_json

Entry = tuple[str, tuple[int, ...]]  # dtype name, shape

DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}

_MAX_HEADER = 16 * 2**20


def read_header(data: bytes) -> dict[str, Entry]:
    """What a safetensors file declares, read before the library sees it; else CorruptError."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(_MAX_HEADER, len(data) - 8):
        raise CorruptError(f"a safetensors segment declares a header of {size} bytes")
    header = parse_json(data[8 : 8 + size])
    if not isinstance(header, dict):
        raise CorruptError("a safetensors header is not a JSON object")
    return {name: _read_entry(name, entry) for name, entry in header.items()}


def _read_entry(name: str, entry: object) -> Entry:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CorruptError(f"the safetensors entry {name!r} is malformed or metadata")
    shape = entry["shape"]
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
        raise CorruptError(f"tensor {name!r} has the shape {shape!r}")
    if entry["dtype"] not in DTYPE_NAMES.values():
        raise CorruptError(f"tensor {name!r} has the dtype {entry['dtype']!r}")
    return str(entry["dtype"]), tuple(shape)


def check_tensors(
    found: Mapping[str, Entry],
    wanted: Mapping[str, Entry],
) -> None:
    """Raise CorruptError, naming the first difference, unless both name the same tensors."""
    if found.keys() != wanted.keys():
        raise CorruptError(
            f"a safetensors segment lacks {sorted(wanted.keys() - found.keys())[:8]} "
            f"and has {sorted(found.keys() - wanted.keys())[:8]} instead"
        )
    for name, want in wanted.items():
        if found[name] != want:
            raise CorruptError(f"tensor {name!r} is {found[name]}, not {want}")
