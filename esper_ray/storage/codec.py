"""Columns as Arrow IPC and tensors as safetensors: exact on the way back, or refused."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import safetensors.torch
import torch
from safetensors import SafetensorError

from esper_ray.errors import CorruptError
from esper_ray.storage.arrow_bounds import ColumnBounds, check_batch
from esper_ray.storage.tensor_header import DTYPE_NAMES, check_tensors, read_header

ROWS_PER_BATCH = 1024

_MAGIC = b"ARROW1\0\0"
_ARROW_TYPES: dict[str, Any] = {
    "int8": pa.int8(),
    "int16": pa.int16(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "uint8": pa.uint8(),
    "float32": pa.float32(),
    "float64": pa.float64(),
}
# Arrow reports bad input by its own type and by most of these.
_ARROW_ERRORS = (
    pa.ArrowException,
    EOFError,
    KeyError,
    MemoryError,
    OSError,
    TypeError,
    ValueError,
)


def encode_table(
    columns: Mapping[str, npt.NDArray[Any]],
    batch_rows: int = ROWS_PER_BATCH,
    *,
    compressed: bool = True,
) -> bytes:
    """Columns of equal length, (n,) or (n, k), as one Arrow IPC file; equal input, equal bytes.

    A batch that is not compressed takes a tenth of the time to read, if it is small.
    """
    lengths = {len(values) for values in columns.values()}
    if len(lengths) != 1:
        raise ValueError(f"columns must be of one length, got {sorted(lengths)}")
    schema = _schema({name: (v.dtype, _width(name, v)) for name, v in columns.items()})
    arrays = [_to_arrow(values) for values in columns.values()]
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd" if compressed else None)
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        writer.write_table(pa.Table.from_arrays(arrays, schema=schema), batch_rows)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def decode_table(
    data: bytes,
    schema: Mapping[str, tuple[np.dtype[Any], int]],
    rows: int,
    batch_rows: int = ROWS_PER_BATCH,
) -> dict[str, npt.NDArray[Any]]:
    """The columns of `data`; CorruptError unless they are exactly `schema` with `rows` rows."""
    wanted = _schema(schema)
    try:
        batches = list(_read_batches(data, wanted, schema, rows, batch_rows))
    except _ARROW_ERRORS as error:
        raise CorruptError(f"an Arrow segment cannot be read: {error}") from error
    return {
        name: _join([batch.column(index) for batch in batches], dtype, width, rows)
        for index, (name, (dtype, width)) in enumerate(schema.items())
    }


def decode_batch(
    data: bytes, schema: Mapping[str, tuple[np.dtype[Any], int]], rows: int
) -> dict[str, npt.NDArray[Any]]:
    """The columns of one batch of a file, given its bytes alone; CorruptError as `decode_table`."""
    try:
        message = pa.ipc.read_message(pa.py_buffer(data))
        batch = _read_batch(message, _known_schema(tuple(schema.items())), schema, rows)
    except _ARROW_ERRORS as error:
        raise CorruptError(f"an Arrow batch cannot be read: {error}") from error
    return {
        name: _join([batch.column(index)], dtype, width, rows)
        for index, (name, (dtype, width)) in enumerate(schema.items())
    }


def check_head(data: bytes, schema: Mapping[str, tuple[np.dtype[Any], int]]) -> None:
    """CorruptError unless `data` is all that a file of this schema has before its first batch."""
    wanted = _known_schema(tuple(schema.items()))
    try:
        message, reader = _first_message(data)
        _check_schema(pa.ipc.read_schema(message), wanted)
        _next_message(reader, "")
    except _ARROW_ERRORS as error:
        raise CorruptError(f"the head of an Arrow segment cannot be read: {error}") from error


def column_names(data: bytes) -> list[str]:
    """Names of the columns of an Arrow segment, none of it decoded; CorruptError if it is none."""
    try:
        names: list[str] = pa.ipc.read_schema(_first_message(data)[0]).names
    except _ARROW_ERRORS as error:
        raise CorruptError(f"an Arrow segment cannot be read: {error}") from error
    return names


def encode_tensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Named tensors as safetensors; equal input gives equal bytes in every process."""
    plain: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        if tensor.dtype not in DTYPE_NAMES or name == "__metadata__":
            raise ValueError(f"tensor {name!r} of {tensor.dtype} cannot be stored")
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return safetensors.torch.save(plain)


def decode_tensors(
    data: bytes, expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] | None = None
) -> dict[str, torch.Tensor]:
    """Writable tensors of their own memory; CorruptError unless exactly the `expected` ones."""
    found = read_header(data)
    if expected is not None:
        wanted = {name: (DTYPE_NAMES[d], tuple(shape)) for name, (d, shape) in expected.items()}
        check_tensors(found, wanted)
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CorruptError(f"a safetensors segment cannot be read: {error}") from error


def _width(name: str, values: npt.NDArray[Any]) -> int:
    if values.ndim not in (1, 2) or (values.ndim == 2 and values.shape[1] == 0):
        raise ValueError(f"column {name!r} has shape {values.shape}, not (n,) or (n, k)")
    return values.shape[1] if values.ndim == 2 else 0


def _schema(columns: Mapping[str, tuple[np.dtype[Any], int]]) -> Any:
    fields = []
    for name, (dtype, width) in columns.items():
        kind = _ARROW_TYPES.get(np.dtype(dtype).name)
        if kind is None or not np.dtype(dtype).isnative:
            raise ValueError(f"column {name!r} of {dtype!r} cannot be stored")
        fields.append((name, pa.list_(kind, width) if width else kind))
    return pa.schema(fields)


def _to_arrow(values: npt.NDArray[Any]) -> Any:
    flat = np.ascontiguousarray(values).reshape(-1)
    # From the buffer, so that no value is ever looked at: NaN payloads stay, nulls cannot arise.
    array = pa.Array.from_buffers(
        _ARROW_TYPES[flat.dtype.name], len(flat), [None, pa.py_buffer(flat)]
    )
    if values.ndim == 1:
        return array
    return pa.FixedSizeListArray.from_arrays(array, values.shape[1])


def _read_batches(
    data: bytes,
    wanted: Any,
    schema: Mapping[str, tuple[np.dtype[Any], int]],
    rows: int,
    batch_rows: int,
) -> Iterator[Any]:
    message, reader = _first_message(data)
    _check_schema(pa.ipc.read_schema(message), wanted)
    for start in range(0, rows, batch_rows):
        message = _next_message(reader, "record batch")
        yield _read_batch(message, wanted, schema, min(batch_rows, rows - start))
    _next_message(reader, "")


def _read_batch(
    message: Any, wanted: Any, schema: Mapping[str, tuple[np.dtype[Any], int]], rows: int
) -> Any:
    bounds = [ColumnBounds(dtype.itemsize, width) for dtype, width in schema.values()]
    check_batch(memoryview(message.metadata), memoryview(message.body), bounds, rows)
    batch = pa.ipc.read_record_batch(message, wanted)
    batch.validate(full=True)
    return batch


@functools.lru_cache(maxsize=64)
def _known_schema(columns: tuple[tuple[str, tuple[np.dtype[Any], int]], ...]) -> Any:
    return _schema(dict(columns))


def _first_message(data: bytes) -> tuple[Any, Any]:
    """The message of the schema, and the reader of those that follow it."""
    if not data.startswith(_MAGIC):
        raise CorruptError("an Arrow segment does not begin as an IPC file")
    # The stream inside the file, not its footer: every message is seen once, in order.
    reader = pa.ipc.MessageReader.open_stream(
        pa.BufferReader(pa.py_buffer(data).slice(len(_MAGIC)))
    )
    return _next_message(reader, "schema"), reader


def _next_message(reader: Any, kind: str) -> Any:
    try:
        message = reader.read_next_message()
    except StopIteration:
        if kind:
            raise CorruptError("an Arrow segment has fewer rows than expected") from None
        return None
    if message.type != kind:
        raise CorruptError(
            f"an Arrow segment has a {message.type} where {kind or 'its end'} belongs"
        )
    return message


def _check_schema(found: Any, wanted: Any) -> None:
    if found.equals(wanted, check_metadata=True):
        return
    if found.names != wanted.names:
        raise CorruptError(f"an Arrow segment has columns {found.names}, not {wanted.names}")
    for have, want in zip(found, wanted, strict=True):
        if not have.equals(want, check_metadata=True):
            raise CorruptError(f"column {want.name!r} of an Arrow segment is {have}, not {want}")
    raise CorruptError("an Arrow segment carries metadata, which is refused")


def _join(arrays: list[Any], dtype: np.dtype[Any], width: int, rows: int) -> npt.NDArray[Any]:
    joined = np.empty((rows, width) if width else (rows,), dtype)
    start = 0
    for array in arrays:
        values = (array.flatten() if width else array).to_numpy(zero_copy_only=True)
        stop = start + len(array)
        joined[start:stop] = values.reshape(-1, width) if width else values
        start = stop
    return joined
