"""What an Arrow record batch declares, read before Arrow decodes a byte of it.

Arrow allocates the length that a compressed buffer declares, so a small file can ask for any
amount of memory. The field numbers are those of Arrow's Message.fbs.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NoReturn

from esper_ray.errors import CorruptError

Bytes = bytes | memoryview

_RECORD_BATCH = 3
_ZSTD = 1
# Arrow may write the padding of a buffer too: up to its alignment of 64 bytes.
_PADDING = 64


@dataclass(frozen=True, slots=True)
class ColumnBounds:
    """One column as the schema and the row count imply it; width 0 is a scalar column."""

    itemsize: int
    width: int


def check_batch(metadata: Bytes, body: Bytes, columns: list[ColumnBounds], rows: int) -> None:
    """Raise CorruptError unless one record batch declares exactly these columns and rows."""
    try:
        _check_batch(metadata, body, columns, rows)
    except struct.error as error:
        raise CorruptError(f"an Arrow record batch is cut short: {error}") from error


def _check_batch(metadata: Bytes, body: Bytes, columns: list[ColumnBounds], rows: int) -> None:
    message = _reference(metadata, 0)
    if _scalar(metadata, message, 1, "<B") != _RECORD_BATCH:
        _refuse("a message that is no record batch")
    batch = _child(metadata, message, 2)
    if _scalar(metadata, batch, 0, "<q") != rows:
        _refuse(f"a batch that has not {rows} rows")
    compressed = _field(metadata, batch, 3) is not None
    if compressed and _scalar(metadata, _child(metadata, batch, 3), 0, "<b") != _ZSTD:
        _refuse("a batch compressed otherwise than with zstd")
    nodes, sizes = _expected(columns, rows)
    if _pairs(metadata, _child(metadata, batch, 1), len(nodes)) != nodes:
        _refuse("columns of other lengths, or nulls")
    buffers = _pairs(metadata, _child(metadata, batch, 2), len(sizes))
    for (offset, length), size in zip(buffers, sizes, strict=True):
        _check_buffer(body, offset, length, size, compressed)


def _expected(columns: list[ColumnBounds], rows: int) -> tuple[list[tuple[int, int]], list[int]]:
    nodes: list[tuple[int, int]] = []
    sizes: list[int] = []
    for column in columns:
        values = rows * (column.width or 1)
        if column.width:
            nodes.append((rows, 0))
            sizes.append(0)
        nodes.append((values, 0))
        sizes += [0, values * column.itemsize]
    return nodes, sizes


def _check_buffer(body: Bytes, offset: int, length: int, size: int, compressed: bool) -> None:
    if size == 0:
        if length != 0:
            _refuse("a buffer where none belongs")
        return
    if offset < 0 or length < 8 * compressed or offset + length > len(body):
        _refuse("a buffer outside its message")
    declared = struct.unpack_from("<q", body, offset)[0] if compressed else length
    if compressed and declared == -1:
        declared = length - 8
    if not size <= declared < size + _PADDING:
        _refuse(f"a buffer of {declared} bytes where {size} belong")


def _unpack(layout: str, data: Bytes, at: int) -> int:
    if at < 0:
        # struct would count a negative offset from the end.
        raise struct.error("negative offset")
    value: int = struct.unpack_from(layout, data, at)[0]
    return value


def _reference(data: Bytes, at: int) -> int:
    return at + _unpack("<I", data, at)


def _field(data: Bytes, table: int, index: int) -> int | None:
    vtable = table - _unpack("<i", data, table)
    slot = 4 + 2 * index
    if slot + 2 > _unpack("<H", data, vtable):
        return None
    offset = _unpack("<H", data, vtable + slot)
    return table + offset if offset else None


def _scalar(data: Bytes, table: int, index: int, layout: str) -> int:
    at = _field(data, table, index)
    return 0 if at is None else _unpack(layout, data, at)


def _child(data: Bytes, table: int, index: int) -> int:
    at = _field(data, table, index)
    if at is None:
        _refuse(f"a table without field {index}")
    return _reference(data, at)


def _pairs(data: Bytes, vector: int, count: int) -> list[tuple[int, int]]:
    if _unpack("<I", data, vector) != count:
        _refuse(f"a vector that has not {count} entries")
    flat = struct.unpack_from(f"<{2 * count}q", data, vector + 4)
    return list(zip(flat[::2], flat[1::2], strict=True))


def _refuse(what: str) -> NoReturn:
    raise CorruptError(f"an Arrow segment declares {what}")
