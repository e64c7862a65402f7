"""Reads Arrow streams that nobody vouches for: schema first, nothing compressed, nothing null."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import pyarrow as pa

from esper_ray.errors import CorruptError

ROWS_PER_BATCH: Final = 65_536
TEXT: Final = "utf8"
# Arrow reports bad input by its own type and by most of these.
_ARROW_ERRORS = (pa.ArrowException, ValueError, TypeError, KeyError, OSError, MemoryError)


def arrow_schema(columns: Mapping[str, str], metadata: Mapping[str, str]) -> Any:
    """The Arrow schema of columns by name and type, none of them nullable."""
    fields = [
        pa.field(name, pa.type_for_alias(kind), nullable=False) for name, kind in columns.items()
    ]
    return pa.schema(fields, metadata={k.encode(): v.encode() for k, v in metadata.items()})


def read_columns(stream: Any, columns: Mapping[str, str], schema: Any, what: str) -> dict[str, Any]:
    """The columns of an Arrow stream that has exactly `schema`; CorruptError for anything else.

    Texts come as lists of str, others as numpy arrays; `what` names the thing in messages.
    """
    try:
        batches = list(_read_batches(stream, schema, what))
        return {
            name: _join(kind, [batch.column(name) for batch in batches])
            for name, kind in columns.items()
        }
    except (*_ARROW_ERRORS, struct.error) as error:
        raise CorruptError(f"{what} cannot be read: {error}") from error


def _read_batches(stream: Any, schema: Any, what: str) -> Iterator[Any]:
    # Message by message and not by a file's footer: each is seen once, in order.
    messages = iter(pa.ipc.MessageReader.open_stream(pa.BufferReader(stream)))
    first = next(messages, None)
    if first is None or first.type != "schema":
        raise CorruptError(f"{what} does not begin with its schema")
    _check_schema(pa.ipc.read_schema(first), schema, what)
    for message in messages:
        if message.type != "record batch":
            raise CorruptError(f"{what} holds a {message.type}")
        if _is_compressed(message.metadata.to_pybytes()):
            raise CorruptError(f"{what} is compressed, which is refused")
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate(full=True)
        if batch.num_rows > ROWS_PER_BATCH or any(column.null_count for column in batch.columns):
            raise CorruptError(f"{what} has a batch that is too long, or nulls")
        yield batch


def _check_schema(found: Any, schema: Any, what: str) -> None:
    key = next(iter(schema.metadata))  # the format's name and version come first
    version = (found.metadata or {}).get(key, b"")
    if version.isdigit() and int(version) > int(schema.metadata[key]):
        raise CorruptError(f"{what} was written by a newer version", "update esper-ray")
    if not found.equals(schema, check_metadata=True):
        raise CorruptError(f"{what} has other columns or metadata: {str(found)[:500]}")


def _is_compressed(message: bytes) -> bool:
    """Whether a record batch says so; Arrow has checked the offsets, but would also decompress.

    Fields 2 of Message (the header) and 3 of RecordBatch (compression) in Arrow's Message.fbs.
    """
    header = _field(message, _target(message, 0), 2)
    return header is None or _field(message, _target(message, header), 3) is not None


def _target(message: bytes, at: int) -> int:
    offset: int = struct.unpack_from("<I", message, at)[0]
    return at + offset


def _field(message: bytes, table: int, index: int) -> int | None:
    vtable = table - struct.unpack_from("<i", message, table)[0]
    slot = 4 + 2 * index
    if slot >= struct.unpack_from("<H", message, vtable)[0]:
        return None
    offset = struct.unpack_from("<H", message, vtable + slot)[0]
    return table + offset if offset else None


def _join(kind: str, arrays: list[Any]) -> Any:
    if kind == TEXT:
        return [text for array in arrays for text in array.to_pylist()]
    return np.concatenate([np.empty(0, kind), *(array.to_numpy() for array in arrays)])
