"""Rows of tensors as safetensors whose blocks of 64 rows can be read alone.

Tensors are named `b00000/<name>`; they lie by dtype, then block, then name, so that a block is one
range of bytes per dtype. The header is canonical: for a schema and a number of rows there is one.
"""

from __future__ import annotations

import functools
import json
import math
import zlib
from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper_ray.errors import CorruptError
from esper_ray.storage.tensor_header import DTYPE_NAMES

BLOCK_ROWS: Final = 64

Specs = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]  # name, dtype, shape of a row


def specs_of(schema: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> Specs:
    """A schema in the order of the file: by dtype, then name."""
    ordered = sorted(schema.items(), key=lambda item: (DTYPE_NAMES[item[1][0]], item[0]))
    return tuple((name, kind, tuple(shape)) for name, (kind, shape) in ordered)


def dtypes_of(specs: Specs) -> list[tuple[str, int]]:
    """(dtype, bytes of a row) in the order of the file."""
    widths: dict[str, int] = {}
    for _, kind, shape in specs:
        name = DTYPE_NAMES[kind]
        widths[name] = widths.get(name, 0) + kind.itemsize * math.prod(shape)
    return list(widths.items())


def encode_blocks(tensors: Mapping[str, Tensor], specs: Specs) -> bytes:
    """Tensors (rows, ...) of at least one row as a safetensors file."""
    rows = len(tensors[specs[0][0]])
    parts = [header(specs, rows)]
    for dtype, width in dtypes_of(specs):
        names = [name for name, kind, _ in specs if DTYPE_NAMES[kind] == dtype]
        pieces = [_bytes(tensors[name], rows) for name in names]
        whole, tail = rows - rows % BLOCK_ROWS, rows % BLOCK_ROWS
        out = np.empty(rows * width, np.uint8)
        blocks = out[: whole * width].reshape(-1, BLOCK_ROWS * width)
        last, at, ended = out[whole * width :], 0, 0
        for piece in pieces:
            size = piece.shape[1]
            blocks[:, at : at + BLOCK_ROWS * size] = piece[:whole].reshape(
                len(blocks), BLOCK_ROWS * size
            )
            last[ended : ended + tail * size] = piece[whole:].reshape(-1)
            at, ended = at + BLOCK_ROWS * size, ended + tail * size
        parts.append(out.data.tobytes())
    return b"".join(parts)


def decode_blocks(data: bytes, specs: Specs, rows: int) -> dict[str, Tensor]:
    """The inverse, in memory of its own; CorruptError unless the file is exactly of this form."""
    start = header(specs, rows)
    if not data.startswith(start) or len(data) != len(start) + rows * _row_bytes(specs):
        raise CorruptError(f"a safetensors segment is not that of {rows} rows of its schema")
    found, at = {}, len(start)
    for dtype, width in dtypes_of(specs):
        whole, tail = rows - rows % BLOCK_ROWS, rows % BLOCK_ROWS
        region = np.frombuffer(data, np.uint8, rows * width, at)
        blocks = region[: whole * width].reshape(-1, BLOCK_ROWS * width)
        last, begun, ended = region[whole * width :], 0, 0
        for name, kind, shape in specs:
            if DTYPE_NAMES[kind] != dtype:
                continue
            size = kind.itemsize * math.prod(shape)
            out = np.empty((rows, size), np.uint8)
            out[:whole].reshape(len(blocks), BLOCK_ROWS * size)[:] = blocks[
                :, begun : begun + BLOCK_ROWS * size
            ]
            out[whole:].reshape(-1)[:] = last[ended : ended + tail * size]
            begun, ended = begun + BLOCK_ROWS * size, ended + tail * size
            found[name] = _tensor(out, kind, (rows, *shape))
        at += rows * width
    return found


def decode_block(data: bytes, specs: Specs, rows: int) -> dict[str, Tensor]:
    """The tensors of one block's ranges in turn; CorruptError unless it has exactly `rows`."""
    if len(data) != rows * _row_bytes(specs):
        raise CorruptError(f"a block of {rows} rows of its schema has not {len(data)} bytes")
    found, at, memory = {}, 0, np.frombuffer(bytearray(data), np.uint8)
    for name, kind, shape in specs:
        size = rows * kind.itemsize * math.prod(shape)
        found[name] = _tensor(memory[at : at + size], kind, (rows, *shape))
        at += size
    return found


def block_ranges(specs: Specs, rows: int) -> list[tuple[tuple[int, int], ...]]:
    """(offset, length) of every block, one per dtype."""
    counts = [min(BLOCK_ROWS, rows - start) for start in range(0, rows, BLOCK_ROWS)]
    at, ranges = len(header(specs, rows)), list[list[tuple[int, int]]]()
    for _, width in dtypes_of(specs):
        column = []
        for count in counts:
            column.append((at, count * width))
            at += count * width
        ranges.append(column)
    return list(zip(*ranges, strict=True))


def block_crc(data: bytes, ranges: tuple[tuple[int, int], ...]) -> int:
    """crc32 of the bytes of a block."""
    crc, view = 0, memoryview(data)
    for offset, length in ranges:
        crc = zlib.crc32(view[offset : offset + length], crc)
    return crc


@functools.lru_cache(maxsize=64)
def header(specs: Specs, rows: int) -> bytes:
    """The first bytes of the file, with which it says what it holds."""
    entries, at = {}, 0
    for dtype, _ in dtypes_of(specs):
        for number, start in enumerate(range(0, rows, BLOCK_ROWS)):
            count = min(BLOCK_ROWS, rows - start)
            for name, kind, shape in specs:
                if DTYPE_NAMES[kind] != dtype:
                    continue
                end = at + count * kind.itemsize * math.prod(shape)
                entries[f"b{number:05d}/{name}"] = {
                    "dtype": dtype,
                    "shape": [count, *shape],
                    "data_offsets": [at, end],
                }
                at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _row_bytes(specs: Specs) -> int:
    return sum(width for _, width in dtypes_of(specs))


def _bytes(tensor: Tensor, rows: int) -> NDArray[np.uint8]:
    """(rows, bytes of a row), the tensor's own memory where it is contiguous on the host."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    found: NDArray[np.uint8] = flat.view(torch.uint8).numpy().reshape(rows, -1)
    return found


def _tensor(memory: NDArray[np.uint8], kind: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not math.prod(shape):
        return torch.empty(shape, dtype=kind)
    return torch.from_numpy(memory.reshape(-1)).view(kind).view(shape)
