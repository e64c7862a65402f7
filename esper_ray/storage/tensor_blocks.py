"""Rows of tensors as safetensors whose blocks of 64 rows can be read alone.

Tensors are named `b00000/<name>`; all those of a block lie together, so that it is one range of
bytes. The header is canonical: for a schema and a number of rows there is one.
"""

from __future__ import annotations

import functools
import json
import math
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
    """A schema in the order of a block: wide types first, which keeps all aligned, then by name."""
    ordered = sorted(schema.items(), key=lambda item: (-item[1][0].itemsize, item[0]))
    return tuple((name, kind, tuple(shape)) for name, (kind, shape) in ordered)


def encode_blocks(tensors: Mapping[str, Tensor], specs: Specs) -> bytes:
    """Tensors (rows, ...) of at least one row as a safetensors file."""
    rows = len(tensors[specs[0][0]])
    out = np.empty(rows * _row_bytes(specs), np.uint8)
    blocks, last = _split(out, rows)
    for name, at, size in _layout(specs):
        piece, full = _bytes(tensors[name], rows), rows - len(last)
        blocks[:, at * BLOCK_ROWS : (at + size) * BLOCK_ROWS] = piece[:full].reshape(
            len(blocks), BLOCK_ROWS * size
        )
        last.reshape(-1)[at * len(last) : (at + size) * len(last)] = piece[full:].reshape(-1)
    return b"".join((header(specs, rows), out.data))


def decode_blocks(data: bytes, specs: Specs, rows: int) -> dict[str, Tensor]:
    """The inverse, in memory of its own; CorruptError unless the file is exactly of this form."""
    body = rows * _row_bytes(specs)
    # How long the header is follows from the rows, which may be claimed by a forger.
    start = header(specs, rows) if 0 < body < len(data) else b""
    if not start or not data.startswith(start) or len(data) != len(start) + body:
        raise CorruptError(f"a safetensors segment is not that of {rows} rows of its schema")
    blocks, last = _split(np.frombuffer(data, np.uint8, offset=len(start)), rows)
    found: dict[str, Tensor] = {}
    for (name, at, size), (_, kind, shape) in zip(_layout(specs), specs, strict=True):
        out, full = np.empty((rows, size), np.uint8), rows - len(last)
        whole = out[:full].reshape(len(blocks), BLOCK_ROWS * size)
        whole[:] = blocks[:, at * BLOCK_ROWS : (at + size) * BLOCK_ROWS]
        tail = last.reshape(-1)[at * len(last) : (at + size) * len(last)]
        out[full:] = tail.reshape(len(last), size)
        found[name] = _tensor(out, kind, (rows, *shape))
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


def block_ranges(specs: Specs, rows: int) -> list[tuple[int, int]]:
    """(offset, length) in bytes of every block."""
    at, width = len(header(specs, rows)), _row_bytes(specs)
    starts = range(0, rows, BLOCK_ROWS)
    return [(at + n * width, min(BLOCK_ROWS, rows - n) * width) for n in starts]


def first_entries(specs: Specs, rows: int) -> bytes:
    """What the header says of the first block of `rows` rows: the file's bytes from 8 on.

    It holds the type and shape of every tensor, and no more of it for however many rows.
    """
    return header(specs, min(rows, BLOCK_ROWS))[8:].rstrip(b" }")


@functools.lru_cache(maxsize=64)
def header(specs: Specs, rows: int) -> bytes:
    """The first bytes of the file, with which it says what it holds."""
    entries, at = {}, 0
    for number, start in enumerate(range(0, rows, BLOCK_ROWS)):
        count = min(BLOCK_ROWS, rows - start)
        for name, kind, shape in specs:
            end = at + count * kind.itemsize * math.prod(shape)
            entries[f"b{number:05d}/{name}"] = {
                "dtype": DTYPE_NAMES[kind],
                "shape": [count, *shape],
                "data_offsets": [at, end],
            }
            at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _layout(specs: Specs) -> list[tuple[str, int, int]]:
    """(name, bytes of a row before it, bytes of a row of it) in the order of a block."""
    found, at = [], 0
    for name, kind, shape in specs:
        size = kind.itemsize * math.prod(shape)
        found.append((name, at, size))
        at += size
    return found


def _row_bytes(specs: Specs) -> int:
    return sum(size for _, _, size in _layout(specs))


def _split(body: NDArray[np.uint8], rows: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Whole blocks (blocks, bytes), and the rows of the last one if it is not whole."""
    whole, tail = divmod(rows, BLOCK_ROWS)
    width = len(body) // rows
    cut = whole * BLOCK_ROWS * width
    return body[:cut].reshape(whole, BLOCK_ROWS * width), body[cut:].reshape(tail, width)


def _bytes(tensor: Tensor, rows: int) -> NDArray[np.uint8]:
    """(rows, bytes of a row), the tensor's own memory where it is contiguous on the host."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    found: NDArray[np.uint8] = flat.view(torch.uint8).numpy().reshape(rows, -1)
    return found


def _tensor(memory: NDArray[np.uint8], kind: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not math.prod(shape):
        return torch.empty(shape, dtype=kind)
    return torch.from_numpy(memory.reshape(-1)).view(kind).view(shape)
