"""Rows as segments that can be read in parts: batches of tables, blocks of tensors."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from esper_ray.errors import ConfigError, CorruptError
from esper_ray.storage import codec, tensor_blocks
from esper_ray.storage.layer_rows import (
    KEY_TABLE,
    KEYS,
    STATE,
    Columns,
    LayerSchema,
    Rows,
    TableSchema,
    Tensors,
    TensorSchema,
    in_order,
)

_NAMED_ROWS: Final = 1_024
_HEAD_BYTES: Final = 2**20
_KEY_TENSORS: Final[TensorSchema] = dict.fromkeys(KEYS, (torch.int32, ()))


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a segment that can be read alone: rows of seeds first..last.

    It is a batch of a table or a block of tensors, `length` bytes from `offset` on, with that
    crc32. `seeds` are those that it has rows of, in order, or nothing where that is not said.
    """

    rows: int
    first: int
    last: int
    offset: int
    length: int
    crc32: int
    seeds: tuple[int, ...] = ()

    def to_json(self) -> list[Any]:
        """The piece as JSON values."""
        numbers = (self.rows, self.first, self.last, self.offset, self.length, self.crc32)
        return [*numbers, list(self.seeds)]

    def may_hold(self, seed_ids: NDArray[np.int64]) -> bool:
        """Whether a row of one of these seeds can be in it."""
        near = seed_ids[(seed_ids >= self.first) & (seed_ids <= self.last)]
        return bool(len(near)) and (not self.seeds or not {*self.seeds}.isdisjoint(near.tolist()))

    def check(self, data: bytes) -> None:
        """CorruptError unless these are its bytes."""
        if zlib.crc32(data) != self.crc32:
            raise CorruptError(f"the piece from byte {self.offset} on has another crc32")

    @classmethod
    def from_json(cls, value: object, size: int) -> Piece:
        """Read a piece of a segment of `size` bytes; CorruptError unless it lies inside."""
        if not isinstance(value, list) or len(value) != 7 or not isinstance(value[6], list):
            raise CorruptError("a manifest holds a malformed piece")
        if any(type(n) is not int or n < 0 for n in (*value[:6], *value[6])):
            raise CorruptError("a manifest holds a piece with a number that is no count")
        rows, first, last, offset, length, crc, seeds = value
        piece = cls(rows, first, last, offset, length, crc, tuple(seeds))
        if not piece.rows or piece.offset + piece.length > size:
            raise CorruptError(f"a manifest holds a piece outside its {size} bytes")
        return piece


@dataclass(frozen=True, slots=True)
class Head:
    """The `length` bytes from `offset` on, before all pieces, in which a segment names its types.

    `check` raises CorruptError unless they are those of the schema.
    """

    offset: int
    length: int
    check: Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One part of some rows as the bytes of a segment."""

    part: str
    suffix: str
    data: bytes
    rows: int
    pieces: tuple[Piece, ...]


def encode(
    rows: Rows, schema: LayerSchema, batch_rows: int = codec.ROWS_PER_BATCH
) -> list[Encoded]:
    """A segment for each part that has rows; ConfigError where rows are not of the schema.

    `batch_rows` is how many rows of a table are read to get one of them; only batches of the usual
    number are compressed.
    """
    _check_schema(rows, schema)
    ordered = in_order(rows)
    tables = [
        _encode_table(part, table, batch_rows)
        for part, table in ordered.tables.items()
        if len(table["seed_id"])
    ]
    blocks = [
        _encode_tensors(part, tensors, schema.tensors[part])
        for part, tensors in ordered.tensors.items()
        if len(tensors["seed_id"])
    ]
    return tables + blocks


def decode_table(data: bytes, pieces: Sequence[Piece], table: TableSchema) -> Columns:
    """Columns of a whole segment; CorruptError unless they are of the schema."""
    rows = sum(piece.rows for piece in pieces)
    return codec.decode_table(data, {**KEY_TABLE, **table}, rows, max(1, pieces[0].rows))


def decode_tensors(data: bytes, pieces: Sequence[Piece], table: TensorSchema) -> Tensors:
    """Tensors of a whole segment; CorruptError unless they are of the schema."""
    rows = sum(piece.rows for piece in pieces)
    return tensor_blocks.decode_blocks(data, _specs(table), rows)


def decode_batch(data: bytes, piece: Piece, table: TableSchema) -> Columns:
    """Columns of one batch of a table; CorruptError unless it is of this form."""
    return codec.decode_batch(data, {**KEY_TABLE, **table}, piece.rows)


def decode_block(data: bytes, piece: Piece, table: TensorSchema) -> Tensors:
    """Tensors of one block; CorruptError unless it is of this form."""
    return tensor_blocks.decode_block(data, _specs(table), piece.rows)


def table_head(pieces: Sequence[Piece], table: TableSchema) -> Head:
    """The head of a table's segment; CorruptError where its pieces leave it no sensible length."""
    stop = pieces[0].offset
    if stop > _HEAD_BYTES:
        raise CorruptError(f"a manifest holds a table whose rows begin at byte {stop} only")
    return Head(0, stop, functools.partial(codec.check_head, schema={**KEY_TABLE, **table}))


def tensor_head(pieces: Sequence[Piece], table: TensorSchema) -> Head:
    """The head of a segment of tensors."""
    entries = tensor_blocks.first_entries(_specs(table), pieces[0].rows)
    return Head(8, len(entries), functools.partial(_check_entries, wanted=entries))


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


def _check_entries(data: bytes, wanted: bytes) -> None:
    if data != wanted:
        raise CorruptError("a safetensors segment does not begin with the tensors of its schema")


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


def _encode_table(part: str, table: Columns, batch_rows: int) -> Encoded:
    ordered = {name: table[name] for name in [*KEYS, *(n for n in table if n not in KEYS)]}
    compressed = batch_rows == codec.ROWS_PER_BATCH
    data, ids = codec.encode_table(ordered, batch_rows, compressed=compressed), table["seed_id"]
    pieces = []
    for number, (offset, length) in enumerate(_batch_ranges(data)):
        seeds = ids[number * batch_rows : (number + 1) * batch_rows]
        crc = zlib.crc32(memoryview(data)[offset : offset + length])
        first, last = int(seeds[0]), int(seeds[-1])
        # A part that few seeds have need not be read for the others.
        named = () if part == STATE or len(ids) > _NAMED_ROWS else tuple(np.unique(seeds).tolist())
        pieces.append(Piece(len(seeds), first, last, offset, length, crc, named))
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


def _specs(table: TensorSchema) -> tensor_blocks.Specs:
    return tensor_blocks.specs_of({**_KEY_TENSORS, **table})


def _encode_tensors(part: str, tensors: Tensors, table: TensorSchema) -> Encoded:
    specs, ids = _specs(table), tensors["seed_id"].numpy()
    data, pieces = tensor_blocks.encode_blocks(tensors, specs), []
    for number, (offset, length) in enumerate(tensor_blocks.block_ranges(specs, len(ids))):
        start = number * tensor_blocks.BLOCK_ROWS
        seeds = ids[start : start + tensor_blocks.BLOCK_ROWS]
        crc = zlib.crc32(memoryview(data)[offset : offset + length])
        pieces.append(Piece(len(seeds), int(seeds[0]), int(seeds[-1]), offset, length, crc))
    return Encoded(part, "safetensors", data, len(ids), tuple(pieces))
