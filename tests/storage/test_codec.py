"""Columns and tensors come back bit for bit; anything else is refused before it is used."""

from __future__ import annotations

import json
import struct
import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_ray.errors import CorruptError
from esper_ray.storage.arrow_bounds import ColumnBounds, check_batch
from esper_ray.storage.codec import (
    decode_batch,
    decode_table,
    decode_tensors,
    encode_table,
    encode_tensors,
)

Columns = dict[str, npt.NDArray[Any]]
DTYPES = ("int8", "int16", "int32", "int64", "uint8", "float32", "float64")


def schema_of(columns: Columns) -> dict[str, tuple[np.dtype[Any], int]]:
    return {k: (v.dtype, v.shape[1] if v.ndim == 2 else 0) for k, v in columns.items()}


def sample(rows: int = 2100) -> Columns:
    return {
        "seed_id": np.arange(rows, dtype=np.int32),
        "history": np.arange(rows * 4, dtype=np.int32).reshape(rows, 4),
        "alpha": np.linspace(0, 1, rows, dtype=np.float32),
    }


def arrow_bytes(batch: Any, compression: str | None = "zstd", size: int = 1024) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(sink, batch.schema, options=options) as writer:
        writer.write_table(batch, size)
    data: bytes = sink.getvalue().to_pybytes()
    return data


@st.composite
def tables(draw: st.DrawFn) -> Columns:
    rows = draw(st.integers(0, 12))
    names = draw(st.lists(st.text(max_size=5), min_size=1, max_size=4, unique=True))
    columns: Columns = {}
    for name in names:
        width = draw(st.integers(0, 3))
        shape = (rows, width) if width else (rows,)
        dtype = np.dtype(draw(st.sampled_from(DTYPES)))
        # Raw bytes, so that every NaN payload can occur.
        size = int(np.prod(shape)) * dtype.itemsize
        raw = draw(st.binary(min_size=size, max_size=size))
        columns[name] = np.frombuffer(raw, dtype).reshape(shape)
    return columns


@given(columns=tables())
@settings(max_examples=60, deadline=None)
def test_table_round_trip_is_bit_exact(columns: Columns) -> None:
    rows = len(next(iter(columns.values())))
    again = decode_table(encode_table(columns), schema_of(columns), rows)
    assert list(again) == list(columns)
    for name, values in columns.items():
        assert again[name].dtype == values.dtype
        assert again[name].shape == values.shape
        assert again[name].tobytes() == values.tobytes()
        assert again[name].flags.writeable


@pytest.mark.parametrize("rows", [0, 1, 1023, 1024, 1025, 4096])
def test_every_batch_boundary_round_trips(rows: int) -> None:
    columns = sample(rows)
    again = decode_table(encode_table(columns), schema_of(columns), rows)
    assert all(np.array_equal(again[name], columns[name]) for name in columns)


def test_equal_tables_give_equal_bytes_also_from_strided_input() -> None:
    columns = sample()
    strided = {name: np.repeat(values, 2, axis=0)[::2] for name, values in columns.items()}
    assert encode_table(columns) == encode_table(strided)


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"a": np.zeros(2, np.int32), "b": np.zeros(3, np.int32)},
        {"a": np.zeros(2, np.complex64)},
        {"a": np.zeros(2, bool)},
        {"a": np.zeros(2, ">i4")},
        {"a": np.zeros((2, 0), np.int32)},
        {"a": np.zeros((2, 2, 2), np.int32)},
    ],
)
def test_columns_without_an_exact_form_are_not_written(columns: Columns) -> None:
    with pytest.raises(ValueError, match="column"):
        encode_table(columns)


def test_wrong_schema_is_named() -> None:
    columns = sample()
    data, right = encode_table(columns), schema_of(columns)
    wrong: list[tuple[dict[str, tuple[np.dtype[Any], int]], str]] = [
        ({k: right[k] for k in reversed(right)}, "has columns"),
        ({k: right[k] for k in list(right)[:2]}, "has columns"),
        ({**right, "more": right["alpha"]}, "has columns"),
        ({**right, "alpha": (np.dtype("float64"), 0)}, "column 'alpha'"),
        ({**right, "history": (np.dtype("int32"), 5)}, "column 'history'"),
        ({**right, "history": (np.dtype("int32"), 0)}, "column 'history'"),
    ]
    for schema, message in wrong:
        with pytest.raises(CorruptError, match=message):
            decode_table(data, schema, 2100)


@pytest.mark.parametrize("rows", [0, 1, 1024, 2048, 2099, 2101, 5000])
def test_wrong_row_count_is_refused(rows: int) -> None:
    columns = sample()
    with pytest.raises(CorruptError):
        decode_table(encode_table(columns), schema_of(columns), rows)


INT = {"a": (np.dtype("int32"), 0)}


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"a": pa.array([1, None, 3], pa.int32())}),
        pa.table({"a": pa.array(["x", "y", "x"]).dictionary_encode()}),
        pa.table({"a": pa.array(["x", "y", "z"])}),
        pa.table(
            [pa.array([1, 2, 3], pa.int32())],
            schema=pa.schema([pa.field("a", pa.int32(), metadata={"ARROW:extension:name": "e"})]),
        ),
        pa.table({"a": pa.array([1, 2, 3], pa.int32())}).replace_schema_metadata({"k": "v"}),
        pa.table(
            [pa.array([1, 2, 3], pa.int32())],
            schema=pa.schema([pa.field("a", pa.int32(), nullable=False)]),
        ),
    ],
    ids=["null", "dictionary", "text", "extension", "metadata", "not nullable"],
)
def test_table_of_another_kind_is_refused(table: Any) -> None:
    with pytest.raises(CorruptError):
        decode_table(arrow_bytes(table), INT, 3)


def test_batches_compressed_by_lz4_are_refused() -> None:
    table = pa.table({"a": pa.array([1, 2, 3], pa.int32())})
    with pytest.raises(CorruptError, match="declares"):
        decode_table(arrow_bytes(table, "lz4"), INT, 3)


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("batch_rows", [1, 64, 1024])
def test_batches_of_other_sizes_round_trip_compressed_or_not(
    compressed: bool, batch_rows: int
) -> None:
    columns = sample(200)
    data = encode_table(columns, batch_rows, compressed=compressed)
    found = decode_table(data, schema_of(columns), 200, batch_rows)
    assert all(value.tobytes() == found[name].tobytes() for name, value in columns.items())


def test_mutated_plain_batches_are_refused_or_keep_the_shape() -> None:
    columns, random = sample(100), np.random.default_rng(0)
    data = encode_table(columns, 64, compressed=False)
    for _ in range(400):
        bad = bytearray(data)
        for at in random.integers(0, len(data), random.integers(1, 5)):
            bad[at] = random.integers(0, 256)
        try:
            found = decode_table(bytes(bad), schema_of(columns), 100, 64)
        except CorruptError:
            continue
        assert {n: (v.shape, v.dtype) for n, v in found.items()} == {
            n: (v.shape, v.dtype) for n, v in columns.items()
        }


def test_other_batch_size_is_refused() -> None:
    table = pa.table({"a": pa.array(range(3), pa.int32())})
    with pytest.raises(CorruptError, match="not 3 rows"):
        decode_table(arrow_bytes(table, size=2), INT, 3)


def test_bomb_is_refused_before_memory_is_taken() -> None:
    bomb = arrow_bytes(pa.table({"a": pa.array(np.zeros(25_000_000, np.int32))}), size=25_000_000)
    assert len(bomb) < 100_000
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    with pytest.raises(CorruptError, match="not 1000 rows"):
        decode_table(bomb, INT, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000
    assert pa.total_allocated_bytes() - before < 5_000_000


def test_declared_length_of_a_buffer_is_checked_before_decoding() -> None:
    data = bytearray(encode_table({"a": np.zeros(1000, np.int32)}))
    at = data.index(struct.pack("<q", 4000) + b"\x28\xb5\x2f\xfd")  # length, then zstd's magic
    data[at : at + 8] = struct.pack("<q", 2**40)
    with pytest.raises(CorruptError, match="1099511627776 bytes where 4000"):
        decode_table(bytes(data), INT, 1000)


@pytest.mark.parametrize("data", [b"", b"ARROW1\0\0", b"ARROW1\0\0" + b"\xff" * 64, b"PK\3\4" * 9])
def test_bytes_that_are_no_arrow_file_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptError):
        decode_table(data, INT, 3)


def test_no_bytes_are_no_batch() -> None:
    for data in (b"", b"\xff\xff\xff\xff\0\0\0\0"):
        with pytest.raises(CorruptError, match="batch cannot be read"):
            decode_batch(data, schema_of(sample(3)), 3)


def test_mutated_arrow_bytes_are_refused_or_keep_the_shape() -> None:
    columns = sample(1100)
    data, schema = encode_table(columns), schema_of(columns)
    rng, limit = np.random.default_rng(7), pa.total_allocated_bytes() + 10_000_000
    refused = 0
    for _ in range(500):
        bad = bytearray(data)
        for at in rng.integers(0, len(bad), 3):
            bad[at] ^= int(rng.integers(1, 256))
        try:
            again = decode_table(bytes(bad), schema, 1100)
        except CorruptError:
            refused += 1
        else:
            assert {k: (v.dtype, v.shape) for k, v in again.items()} == {
                k: (v.dtype, v.shape) for k, v in columns.items()
            }
        assert pa.total_allocated_bytes() < limit
    assert refused > 30


def test_truncated_arrow_bytes_are_refused() -> None:
    columns = sample(300)
    data = encode_table(columns)
    footer = data.rindex(b"\xff\xff\xff\xff\0\0\0\0")  # the end of the stream inside the file
    for length in range(0, footer, 37):
        with pytest.raises(CorruptError):
            decode_table(data[:length], schema_of(columns), 300)


def batch_message() -> tuple[bytes, bytes]:
    reader = pa.ipc.MessageReader.open_stream(
        pa.BufferReader(encode_table({"a": np.zeros(9, np.int32)})[8:])
    )
    reader.read_next_message()
    message = reader.read_next_message()
    return message.metadata.to_pybytes(), message.body.to_pybytes()


def test_bounds_check_survives_any_metadata() -> None:
    metadata, body = batch_message()
    bounds = [ColumnBounds(4, 0)]
    check_batch(metadata, body, bounds, 9)
    for at in range(len(metadata)):
        for value in (0, 1, 0x7F, 0x80, 0xFF):
            bad = metadata[:at] + bytes([value]) + metadata[at + 1 :]
            try:
                check_batch(bad, body, bounds, 9)
            except CorruptError:
                continue
    for length in range(len(metadata)):
        with pytest.raises(CorruptError):
            check_batch(metadata[:length], body, bounds, 9)


def test_buffer_stored_plain_is_measured_by_its_own_length() -> None:
    metadata, body = batch_message()
    with pytest.raises(CorruptError, match="bytes where 36 belong"):
        check_batch(metadata, struct.pack("<q", -1) + body[8:], [ColumnBounds(4, 0)], 9)


def test_bounds_check_refuses_a_schema_message_and_a_short_body() -> None:
    metadata, body = batch_message()
    with pytest.raises(CorruptError, match="outside"):
        check_batch(metadata, body[:4], [ColumnBounds(4, 0)], 9)
    reader = pa.ipc.MessageReader.open_stream(
        pa.BufferReader(encode_table({"a": np.zeros(9, np.int32)})[8:])
    )
    with pytest.raises(CorruptError, match="no record batch"):
        check_batch(reader.read_next_message().metadata.to_pybytes(), b"", [], 9)
    with pytest.raises(CorruptError, match="cut short"):
        check_batch(struct.pack("<Ii", 4, 100), b"", [], 9)


# ------------------------------------------------------------------ safetensors


def tensors() -> dict[str, torch.Tensor]:
    return {
        "w": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "half": torch.tensor([1.5, -0.0, float("nan")], dtype=torch.bfloat16),
        "step": torch.tensor(7, dtype=torch.int64),
        "empty": torch.zeros(0, 3),
        "mask": torch.tensor([True, False]),
    }


def expected_of(values: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (value.dtype, tuple(value.shape)) for name, value in values.items()}


def raw(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def test_tensors_round_trip_bit_exactly_into_memory_of_their_own() -> None:
    values = tensors()
    again = decode_tensors(encode_tensors(values), expected_of(values))
    assert sorted(again) == sorted(values)
    for name, value in values.items():
        assert again[name].dtype == value.dtype
        assert again[name].shape == value.shape
        assert encode_tensors({"x": again[name]}) == encode_tensors({"x": value})
    again["w"].add_(1)
    assert torch.equal(values["w"], torch.arange(6.0).reshape(2, 3))


def test_no_tensors_round_trip() -> None:
    assert decode_tensors(encode_tensors({}), {}) == {}


def test_order_layout_and_sharing_do_not_change_the_bytes() -> None:
    base = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    parameter = torch.nn.Parameter(base)
    shared = {"b": parameter, "a": base, "c": base[1], "t": base.t().contiguous().t()}
    apart = {"t": base.clone(), "a": base.clone(), "c": base[1].clone(), "b": base.clone()}
    assert encode_tensors(shared) == encode_tensors(apart)


@pytest.mark.parametrize(
    "values", [{"__metadata__": torch.ones(1)}, {"z": torch.ones(1, dtype=torch.complex64)}]
)
def test_tensor_without_an_exact_form_is_not_written(values: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="cannot be stored"):
        encode_tensors(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": (torch.float64, (2, 3))}, "'w' is"),
        ({"w": (torch.float32, (3, 2))}, "'w' is"),
        ({"more": (torch.float32, ())}, "lacks"),
    ],
)
def test_tensors_other_than_expected_are_refused(change: dict[str, Any], message: str) -> None:
    values = tensors()
    with pytest.raises(CorruptError, match=message):
        decode_tensors(encode_tensors(values), {**expected_of(values), **change})


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**40),
        struct.pack("<Q", 100) + b"{}",
        raw([]),
        raw(b"{"),
        raw(b'{"a":1,"a":1}'),
        raw({"a": 1}),
        raw({"__metadata__": {"x": "y"}}),
        raw({"a": {**ENTRY, "more": 1}}, b"1234"),
        raw({"a": {**ENTRY, "dtype": "F99"}}, b"1234"),
        raw({"a": {**ENTRY, "dtype": []}}, b"1234"),
        raw({"a": {**ENTRY, "shape": [-1]}}, b"1234"),
        raw({"a": {**ENTRY, "shape": 1}}, b"1234"),
        raw({"a": {**ENTRY, "shape": [2**40, 2**40]}}, b"1234"),
        raw({"a": {**ENTRY, "shape": [True]}}, b"1234"),
        raw({"a": {**ENTRY, "data_offsets": [0, 8]}}, b"1234"),
        raw({"a": {**ENTRY, "data_offsets": [-4, 0]}}, b"1234"),
        raw({"a": {**ENTRY, "data_offsets": "x"}}, b"1234"),
        raw({"a": ENTRY, "b": ENTRY}, b"1234"),
        raw({"a": ENTRY}, b"12345678"),
        raw({"a": ENTRY}, b"123"),
    ],
)
def test_hostile_safetensors_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptError):
        decode_tensors(data)


def test_mutated_safetensors_are_refused_or_keep_the_shape() -> None:
    values = tensors()
    data, rng = encode_tensors(values), np.random.default_rng(7)
    for _ in range(500):
        bad = bytearray(data)
        bad[int(rng.integers(0, len(bad)))] ^= int(rng.integers(1, 256))
        try:
            again = decode_tensors(bytes(bad), expected_of(values))
        except CorruptError:
            continue
        assert expected_of(again) == expected_of(values)
