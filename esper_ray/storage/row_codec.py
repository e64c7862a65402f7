"""Rows as segments that can be read in parts: batches of tables, blocks of tensors."""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch

from esper_ray.errors import ConfigError, CorruptError
from esper_ray.storage import codec
from esper_ray.storage.layer_rows import (
    KEY_TABLE,
    KEYS,
    Columns,
    LayerSchema,
    Rows,
    TableSchema,
    Tensors,
    TensorSchema,
    check_keys,
    in_order,
)
from esper_ray.storage.tensor_header import DTYPE_NAMES

BLOCK_ROWS: Final = 64

_END = b"\xff\xff\xff\xff\0\0\0\0"
_TORCH = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_KEY_TENSORS: Final[TensorSchema] = dict.fromkeys(KEYS, (torch.int32, ()))


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a segment that can be read alone: rows of seeds first..last.

    `ranges` are (offset, length) in bytes, one for a batch of a table and one per dtype for a block
    of tensors; `crc32` is that of all their bytes in turn.
    """

    rows: int
    first: int
    last: int
    ranges: tuple[tuple[int, int], ...]
    dtypes: tuple[str, ...]
    crc32: int

    def to_json(self) -> list[Any]:
        """The piece as JSON values."""
        ranges = [list(pair) for pair in self.ranges]
        return [self.rows, self.first, self.last, ranges, list(self.dtypes), self.crc32]

    @classmethod
    def from_json(cls, value: object, size: int) -> Piece:
        """Read a piece of a segment of `size` bytes; CorruptError unless it lies inside."""
        if not isinstance(value, list) or len(value) != 6:
            raise CorruptError("a manifest holds a malformed piece")
        rows, first, last, ranges, dtypes, crc = value
        try:
            piece = cls(rows, first, last, tuple((o, n) for o, n in ranges), tuple(dtypes), crc)
        except (TypeError, ValueError) as error:
            raise CorruptError(f"a manifest holds a malformed piece: {error}") from error
        numbers = [rows, first, last, crc, *(n for pair in piece.ranges for n in pair)]
        if any(type(n) is not int or n < 0 for n in numbers):
            raise CorruptError("a manifest holds a piece with a number that is no count")
        if any(offset + length > size for offset, length in piece.ranges) or not ranges:
            raise CorruptError(f"a manifest holds a piece outside its {size} bytes")
        if any(name not in _TORCH for name in dtypes) or len(set(dtypes)) != len(dtypes):
            raise CorruptError(f"a manifest holds a piece of the dtypes {dtypes!r}")
        return piece


@dataclass(frozen=True, slots=True)
class Encoded:
    """One part of some rows as the bytes of a segment."""

    part: str
    suffix: str
    data: bytes
    rows: int
    pieces: tuple[Piece, ...]


def encode(rows: Rows, schema: LayerSchema) -> list[Encoded]:
    """A segment for each part that has rows; ConfigError where rows are not of the schema."""
    _check_schema(rows, schema)
    ordered = in_order(rows)
    tables = [_encode_table(p, t) for p, t in ordered.tables.items() if len(t["seed_id"])]
    blocks = [_encode_tensors(p, t) for p, t in ordered.tensors.items() if len(t["seed_id"])]
    return tables + blocks


def decode(parts: Mapping[str, bytes], counts: Mapping[str, int], schema: LayerSchema) -> Rows:
    """Rows of whole segments, by part; CorruptError unless they are of the schema."""
    tables = {
        part: codec.decode_table(parts[part], {**KEY_TABLE, **table}, counts[part])
        if part in parts
        else empty_table(table)
        for part, table in schema.tables.items()
    }
    tensors = {
        part: _decode_tensors(parts[part], table, counts[part])
        if part in parts
        else empty_tensors(table)
        for part, table in schema.tensors.items()
    }
    rows = Rows(tables, tensors)
    check_keys(rows)
    return rows


def decode_batch(data: bytes, piece: Piece, table: TableSchema) -> Columns:
    """Columns of one batch of a table; CorruptError unless it is of this form."""
    full = tuple((name, *spec) for name, spec in {**KEY_TABLE, **table}.items())
    return codec.decode_table(_prelude(full) + data + _END, {**KEY_TABLE, **table}, piece.rows)


def decode_block(data: bytes, piece: Piece, table: TensorSchema) -> Tensors:
    """Tensors of one block; CorruptError unless it is of this form."""
    full, tensors, at = {**_KEY_TENSORS, **table}, Tensors(), 0
    for name in _stored_order(full, piece.dtypes):
        kind, shape = full[name]
        count = piece.rows * int(np.prod(shape))
        stop = at + count * kind.itemsize
        if stop > len(data):
            break
        flat = torch.frombuffer(bytearray(data[at:stop]), dtype=kind) if count else torch.empty(0)
        tensors[name], at = flat.to(kind).view(piece.rows, *shape), stop
    if len(tensors) != len(full) or at != len(data):
        raise CorruptError(f"a block of {piece.rows} rows does not fill its {len(data)} bytes")
    return tensors


def empty_table(table: TableSchema) -> Columns:
    """The columns of a table without rows."""
    return {
        name: np.empty((0, width) if width else (0,), kind)
        for name, (kind, width) in {**KEY_TABLE, **table}.items()
    }


def empty_tensors(table: TensorSchema) -> Tensors:
    """The tensors of a part without rows."""
    specs = {**_KEY_TENSORS, **table}
    return {name: torch.empty((0, *shape), dtype=kind) for name, (kind, shape) in specs.items()}


def _check_schema(rows: Rows, schema: LayerSchema) -> None:
    if rows.tables.keys() != schema.tables.keys() or rows.tensors.keys() != schema.tensors.keys():
        raise ConfigError(f"rows have the parts {[*rows.tables, *rows.tensors]}, not the schema's")
    for part, table in schema.tables.items():
        found = {
            n: (v.dtype, 0 if v.ndim == 1 else v.shape[1]) for n, v in rows.tables[part].items()
        }
        _same(part, found, {**KEY_TABLE, **table})
    for part, tensors in schema.tensors.items():
        shapes = {n: (v.dtype, tuple(v.shape[1:])) for n, v in rows.tensors[part].items()}
        _same(part, shapes, {**_KEY_TENSORS, **tensors})


def _same(part: str, found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    if found != wanted:
        differ = sorted(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))
        name = differ[0]
        raise ConfigError(f"{part!r} has {name} {found.get(name)}, not {wanted.get(name)}")


def _encode_table(part: str, table: Columns) -> Encoded:
    ordered = {name: table[name] for name in [*KEYS, *(n for n in table if n not in KEYS)]}
    data, ids = codec.encode_table(ordered), table["seed_id"]
    pieces = []
    for number, (offset, length) in enumerate(_batch_ranges(data)):
        seeds = ids[number * codec.ROWS_PER_BATCH : (number + 1) * codec.ROWS_PER_BATCH]
        crc = zlib.crc32(memoryview(data)[offset : offset + length])
        first, last = int(seeds[0]), int(seeds[-1])
        pieces.append(Piece(len(seeds), first, last, ((offset, length),), (), crc))
    return Encoded(part, "arrow", data, len(ids), tuple(pieces))


def _batch_ranges(data: bytes) -> Iterator[tuple[int, int]]:
    """(offset, length) of every record batch of an IPC file that this process has written."""
    source = pa.BufferReader(data)
    source.seek(8)
    reader = pa.ipc.MessageReader.open_stream(source)
    began = _end_of_message(reader, source)
    while (ended := _end_of_message(reader, source)) is not None:
        yield began, ended - began
        began = ended


def _end_of_message(reader: Any, source: Any) -> Any:
    try:
        reader.read_next_message()
    except StopIteration:
        return None
    return source.tell()


@functools.lru_cache(maxsize=64)
def _prelude(table: tuple[tuple[str, np.dtype[Any], int], ...]) -> bytes:
    """What an IPC file of these columns holds before its first batch."""
    columns = {n: np.empty((0, width) if width else (0,), kind) for n, kind, width in table}
    data = codec.encode_table(columns)
    source = pa.BufferReader(data)
    source.seek(8)
    return data[: _end_of_message(pa.ipc.MessageReader.open_stream(source), source)]


def _encode_tensors(part: str, tensors: Tensors) -> Encoded:
    count = len(tensors["seed_id"])
    starts = range(0, count, BLOCK_ROWS)
    named = {
        f"b{number:05d}/{name}": value[start : start + BLOCK_ROWS]
        for number, start in enumerate(starts)
        for name, value in tensors.items()
    }
    data = codec.encode_tensors(named)
    ranges = _block_ranges(data)
    ids, pieces = tensors["seed_id"], []
    for number, start in enumerate(starts):
        seeds = ids[start : start + BLOCK_ROWS]
        spans = ranges[f"b{number:05d}"]
        crc = 0
        for offset, length in spans.values():
            crc = zlib.crc32(memoryview(data)[offset : offset + length], crc)
        ends = int(seeds[0]), int(seeds[-1])
        pieces.append(Piece(len(seeds), *ends, tuple(spans.values()), tuple(spans), crc))
    return Encoded(part, "safetensors", data, count, tuple(pieces))


def _block_ranges(data: bytes) -> dict[str, dict[str, tuple[int, int]]]:
    """Block -> dtype -> (offset, length), in the order of the file this process has written."""
    size = int.from_bytes(data[:8], "little")
    spans: dict[str, dict[str, list[tuple[int, int]]]] = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        block = spans.setdefault(name.partition("/")[0], {})
        begin, end = entry["data_offsets"]
        block.setdefault(entry["dtype"], []).append((begin, end))
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for name, dtypes in spans.items():
        whole = {d: (min(p)[0], max(p)[1], sum(e - b for b, e in p)) for d, p in dtypes.items()}
        if any(end - begin != held for begin, end, held in whole.values()):
            raise RuntimeError("the serializer does not keep the tensors of a block together")
        ordered = sorted(whole.items(), key=lambda item: item[1])
        found[name] = {d: (8 + size + begin, end - begin) for d, (begin, end, _) in ordered}
    return found


def _stored_order(specs: TensorSchema, dtypes: Sequence[str]) -> list[str]:
    names = sorted(specs)
    return [name for kind in dtypes for name in names if DTYPE_NAMES[specs[name][0]] == kind]


def _decode_tensors(data: bytes, table: TensorSchema, rows: int) -> Tensors:
    specs, counts = {**_KEY_TENSORS, **table}, _block_rows(rows)
    expected = {
        f"b{number:05d}/{name}": (kind, (count, *shape))
        for number, count in enumerate(counts)
        for name, (kind, shape) in specs.items()
    }
    blocks = codec.decode_tensors(data, expected)
    return {
        name: torch.cat([blocks[f"b{number:05d}/{name}"] for number in range(len(counts))])
        for name in specs
    }


def _block_rows(rows: int) -> list[int]:
    return [min(BLOCK_ROWS, rows - start) for start in range(0, rows, BLOCK_ROWS)]
