"""The event log comes back exactly, or is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from esper_ray.errors import CorruptError
from esper_ray.events import gate, log
from esper_ray.events.log import (
    SCHEMA,
    EventKind,
    Events,
    decode,
    encode,
    gate_json,
    parse_gate,
)

ARROW_SCHEMA = pa.schema(
    [pa.field(name, pa.type_for_alias(kind), nullable=False) for name, kind in SCHEMA.items()],
    metadata={"esper-log": "1"},
)
texts = st.text(st.characters(codec="utf-8"), max_size=6)


def column(kind: str, rows: int) -> st.SearchStrategy[Any]:
    if kind == "utf8":
        return st.lists(texts, min_size=rows, max_size=rows)
    dtype = np.dtype(kind)
    # Every bit pattern is a value, NaN payloads and infinities among them.
    return st.binary(min_size=rows * dtype.itemsize, max_size=rows * dtype.itemsize).map(
        lambda data: np.frombuffer(data, dtype)
    )


@st.composite
def any_events(draw: st.DrawFn) -> Events:
    rows = draw(st.integers(0, 7))
    columns = {name: draw(column(kind, rows)) for name, kind in SCHEMA.items()}
    columns["sequence"] = np.sort(columns["sequence"])
    columns["kind"] = columns["kind"] % len(EventKind)
    return Events(columns)


def same(one: Events, other: Events) -> bool:
    return all(
        one.columns[name] == other.columns[name]
        if kind == "utf8"
        else one.columns[name].dtype == other.columns[name].dtype
        and one.columns[name].tobytes() == other.columns[name].tobytes()
        for name, kind in SCHEMA.items()
    )


def some_events() -> Events:
    verdict = gate_json("improvement", {"x": 0.5}, {"x": ">= 0.1"}, "accepted")
    return Events.concatenate(
        [
            Events.build(EventKind.EPOCH, "encoder.3", 1, 0, 8, 1, errors=4),
            Events.build(
                EventKind.TRANSITION,
                "übung",
                2,
                1,
                16,
                rows=3,
                seed_id=np.arange(3),
                from_state=2,
                to_state=3,
                cause="POLICY",
                gate=verdict,
                alpha=np.array([0.0, 0.1, math.nan]),
            ),
        ]
    )


def arrow_file(schema: Any = ARROW_SCHEMA, rows: int = 2, **change: Any) -> bytes:
    """What some other writer could have stored: any schema, columns and options."""
    options = change.pop("options", None)
    columns = Events.build(EventKind.ERRORS, "a", 0, 0, 0, rows).columns
    arrays = {name: pa.array(columns[name], ARROW_SCHEMA.field(name).type) for name in SCHEMA}
    arrays |= change
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        writer.write_table(pa.Table.from_arrays([arrays[n] for n in schema.names], schema=schema))
    data: bytes = sink.getvalue().to_pybytes()
    return data


# ------------------------------------------------------------------ round trip


@settings(max_examples=50, deadline=None)
@given(events=any_events())
def test_every_value_comes_back_bit_for_bit(events: Events) -> None:
    data = encode(events)
    again = decode(data)
    assert same(again, events)
    assert encode(again) == data


def test_batches_are_bounded_and_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "ROWS_PER_BATCH", 3)
    events = Events.build(EventKind.ERRORS, "a", np.arange(8), 0, 0, 8, seed_id=np.arange(8))
    data = encode(events)
    assert pa.ipc.open_file(data).num_record_batches == 3
    assert same(decode(data), events)
    monkeypatch.setattr(log, "ROWS_PER_BATCH", 2)
    with pytest.raises(CorruptError, match="too long"):
        decode(data)


def test_stored_file_says_its_format_and_is_not_compressed() -> None:
    events = Events.build(EventKind.ERRORS, "a", 0, 0, 0, 1000)
    data = encode(events)
    assert pa.ipc.open_file(data).schema.equals(ARROW_SCHEMA, check_metadata=True)
    assert len(data) > sum(events.columns[n].nbytes for n, k in SCHEMA.items() if k != "utf8")


def test_columns_read_back_may_be_written_to() -> None:
    decode(encode(some_events())).columns["alpha"][0] = 1.0


# ------------------------------------------------------------------ building and choosing


def test_columns_not_given_do_not_apply() -> None:
    given = {"kind": 3, "layer": "a", "sequence": 5, "epoch": 6, "step": 7, "loss": 0.25}
    events = Events.build(EventKind.METRICS, "a", 5, 6, 7, rows=2, loss=0.25)
    for name, kind in SCHEMA.items():
        values = list(events.columns[name])
        if name in given:
            assert values == [given[name]] * 2
        elif kind == "utf8":
            assert values == ["", ""]
        elif kind.startswith("float"):
            assert np.isnan(values).all()
        else:
            assert values == [0 if kind.startswith("u") else -1] * 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("generation", 2**31),
        ("generation", 0.5),
        ("generation", math.nan),
        ("valid", -1),
        ("valid", 256),
        ("strategy", np.array([1, 128])),
        ("seed_id", np.array([2**40, 1])),
        ("seed_id", np.arange(3)),
        ("cause", ["a"]),
        ("alpha", "high"),
    ],
)
def test_value_that_its_column_cannot_hold_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"column|shape|could not convert"):
        Events.build(EventKind.METRICS, "a", 0, 0, 0, 2, **{name: value})


def test_unknown_column_is_refused() -> None:
    with pytest.raises(TypeError, match=r"\['colour'\]"):
        Events.build(EventKind.METRICS, "a", 0, 0, 0, 1, colour=1)


def test_loss_beyond_the_column_is_infinite() -> None:
    events = Events.build(EventKind.METRICS, "a", 0, 0, 0, 1, loss=1e300)
    assert events.columns["loss"].tolist() == [math.inf]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("seed_id", np.zeros(2, np.int64)),
        ("seed_id", np.zeros(2, ">i4")),
        ("seed_id", np.zeros((2, 1), np.int32)),
        ("seed_id", np.zeros(3, np.int32)),
        ("layer", np.zeros(2, np.int32)),
        ("layer", ["a"]),
        ("extra", ["a", "b"]),
    ],
)
def test_columns_of_another_form_are_no_events(name: str, values: Any) -> None:
    columns = dict(Events.build(EventKind.METRICS, "a", 0, 0, 0, 2).columns)
    with pytest.raises(ValueError, match="column"):
        Events({**columns, name: values})


@settings(max_examples=30, deadline=None)
@given(events=any_events(), data=st.data())
def test_parts_joined_are_the_whole(events: Events, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(events)))
    at = np.arange(len(events))
    assert same(Events.concatenate([events.take(at[:cut]), events.take(at[cut:])]), events)


@settings(max_examples=30, deadline=None)
@given(events=any_events(), data=st.data())
def test_mask_and_its_indices_choose_the_same(events: Events, data: st.DataObject) -> None:
    rows = len(events)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)), bool)
    chosen = events.take(mask)
    assert len(chosen) == mask.sum()
    assert same(chosen, events.take(np.flatnonzero(mask)))
    assert same(events.take(~mask & mask), Events.empty())


@pytest.mark.parametrize("rows", [np.ones(3, bool), np.array([9])])
def test_choice_of_another_length_is_an_error(rows: NDArray[Any]) -> None:
    with pytest.raises(IndexError):
        some_events().take(rows)


def test_events_of_a_layer_and_of_one_seed_are_found() -> None:
    events = some_events()
    assert len(events.of("encoder.3")) == 1
    assert events.of("übung").columns["seed_id"].tolist() == [0, 1, 2]
    assert events.of("übung", 1).columns["seed_id"].tolist() == [1]
    assert len(events.of("encoder")) == len(events.of("übung", 9)) == len(Events.empty()) == 0
    assert len(Events.concatenate([])) == 0


# ------------------------------------------------------------------ hostile bytes


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_changed_bytes_are_read_or_refused(data: st.DataObject) -> None:
    stored = bytearray(WHOLE)
    at = st.integers(0, len(stored) - 1)
    for place, value in data.draw(st.lists(st.tuples(at, st.integers(0, 255)), max_size=20)):
        stored[place] = value
    accept(bytes(stored))


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200), cut=st.integers(0, 5000))
def test_any_bytes_are_read_or_refused(data: bytes, cut: int) -> None:
    accept(data)
    accept(b"ARROW1\0\0" + data + b"ARROW1")
    accept(WHOLE[:cut] + data + WHOLE[cut:])
    accept(WHOLE[:cut] + b"ARROW1")


def accept(data: bytes) -> None:
    try:
        events = decode(data)
    except CorruptError:
        return
    assert set(events.columns["kind"].tolist()) <= set(EventKind)


WHOLE = encode(some_events())


def test_every_truncation_is_refused() -> None:
    for length in range(len(WHOLE)):
        with pytest.raises(CorruptError):
            decode(WHOLE[:length])


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_compressed_file_is_refused_unread(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = arrow_file(rows=5000, options=pa.ipc.IpcWriteOptions(compression=codec))
    monkeypatch.setattr(pa.ipc, "read_record_batch", None)
    with pytest.raises(CorruptError, match="compressed"):
        decode(data)


def test_file_of_a_newer_version_asks_for_an_update() -> None:
    newer = pa.schema([*ARROW_SCHEMA, ("colour", pa.int8())], {"esper-log": "2"})
    data = arrow_file(newer, colour=pa.array([1, 2], pa.int8()))
    with pytest.raises(CorruptError, match="newer version") as caught:
        decode(data)
    assert caught.value.hint == "update esper-ray"


def schemas() -> Iterable[Any]:
    yield pa.schema(list(ARROW_SCHEMA)), {}
    yield ARROW_SCHEMA.with_metadata({"esper-log": "0"}), {}
    yield ARROW_SCHEMA.with_metadata({"esper-log": "9" * 5000}), {}
    yield ARROW_SCHEMA.with_metadata({"esper-log": "1", "more": "x"}), {}
    yield pa.schema(list(ARROW_SCHEMA)[:-1], ARROW_SCHEMA.metadata), {}
    yield pa.schema(list(ARROW_SCHEMA)[::-1], ARROW_SCHEMA.metadata), {}
    step = ARROW_SCHEMA.get_field_index("step")
    yield ARROW_SCHEMA.set(step, pa.field("step", pa.int64())), {}
    marked = pa.field("step", pa.int64(), nullable=False, metadata={"ARROW:extension:name": "x"})
    yield ARROW_SCHEMA.set(step, marked), {}
    wide = pa.field("step", pa.int32(), nullable=False)
    yield ARROW_SCHEMA.set(step, wide), {"step": pa.array([1, 2], pa.int32())}
    names = pa.array(["a", "b"]).dictionary_encode()
    layer = ARROW_SCHEMA.get_field_index("layer")
    yield ARROW_SCHEMA.set(layer, pa.field("layer", names.type, nullable=False)), {"layer": names}


@pytest.mark.parametrize(("schema", "change"), list(schemas()))
def test_file_of_another_schema_is_refused(schema: Any, change: dict[str, Any]) -> None:
    with pytest.raises(CorruptError, match=r"columns or metadata|digits"):
        decode(arrow_file(schema, **change))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"step": pa.array([1, None], pa.int64())}, "nulls"),
        ({"gate": pa.array(["", None], pa.string())}, "nulls"),
        ({"kind": pa.array([0, 8], pa.uint8())}, "8 is no kind"),
        ({"sequence": pa.array([2, 1], pa.uint64())}, "sequence falls"),
        ({"gate": pa.array(["", "x" * 65_537])}, "more than 65536 bytes"),
        ({"layer": pa.array(["", "ü" * 32_769])}, "'layer' has more"),
        ({"cause": pa.array([b"\xff", b""], pa.binary()).view(pa.string())}, "UTF8"),
    ],
)
def test_columns_with_wrong_values_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(CorruptError, match=reason):
        decode(arrow_file(**change))


def test_message_out_of_place_is_refused() -> None:
    table = pa.table({"x": pa.array(["a"]).dictionary_encode()})
    streams = [pa.BufferOutputStream(), pa.BufferOutputStream()]
    for sink, schema in zip(streams, (table.schema, ARROW_SCHEMA), strict=True):
        with pa.ipc.new_stream(sink, schema) as writer:
            if schema is table.schema:
                writer.write_table(table)
    foreign, ours = (sink.getvalue().to_pybytes() for sink in streams)
    end = b"\xff\xff\xff\xff\0\0\0\0"
    body = ours.removesuffix(end) + foreign
    with pytest.raises(CorruptError, match="holds a schema"):
        decode(b"ARROW1\0\0" + body + b"ARROW1")
    with pytest.raises(CorruptError, match="begin with its schema"):
        decode(b"ARROW1\0\0" + end + b"ARROW1")


@pytest.mark.parametrize(
    "change",
    [
        {"sequence": np.array([2, 1])},
        {"kind": np.array([0, 8])},
        {"gate": "x" * 65_537},
        {"gate": "\ud800"},
    ],
)
def test_events_that_could_not_be_read_back_are_not_written(change: dict[str, Any]) -> None:
    events = Events.build(EventKind.ERRORS, "a", 0, 0, 0, 2)
    columns = dict(events.columns)
    for name, value in change.items():
        kind = SCHEMA[name]
        columns[name] = [value] * 2 if kind == "utf8" else value.astype(kind)
    with pytest.raises(ValueError, match=r"cannot be stored|surrogates"):
        encode(Events(columns))


def test_longest_text_comes_back() -> None:
    events = Events.build(EventKind.ERRORS, "ü" * 32_768, 0, 0, 0, 1)
    assert same(decode(encode(events)), events)


# ------------------------------------------------------------------ gates

numbers = st.none() | st.floats()


@settings(max_examples=60, deadline=None)
@given(
    name=texts,
    inputs=st.dictionaries(texts, numbers, max_size=4),
    thresholds=st.dictionaries(texts, texts, max_size=4),
    verdict=texts,
)
def test_gate_comes_back_with_unmeasured_inputs_as_none(
    name: str,
    inputs: dict[str, float | None],
    thresholds: dict[str, str],
    verdict: str,
) -> None:
    text = gate_json(name, inputs, thresholds, verdict)
    again = parse_gate(text)
    assert again is not None
    assert gate_json(**again) == text
    assert (again["name"], again["thresholds"], again["verdict"]) == (name, thresholds, verdict)
    assert again["inputs"] == {
        key: value if value is not None and math.isfinite(value) else None
        for key, value in inputs.items()
    }


def test_gate_is_canonical_json_of_plain_numbers() -> None:
    inputs: dict[str, Any] = {"b": np.float32(0.5), "a": 3, "c": math.inf}
    text = gate_json("fully_blended", inputs, {"b": "== 1"}, "accepted")
    assert text == (
        '{"inputs":{"a":3.0,"b":0.5,"c":null},"name":"fully_blended",'
        '"thresholds":{"b":"== 1"},"verdict":"accepted"}'
    )


def test_event_without_a_gate_has_none() -> None:
    assert parse_gate("") is None


def test_gate_longer_than_a_text_is_refused() -> None:
    text = gate_json("g", {}, {}, "x" * gate.MAX_TEXT_BYTES)
    with pytest.raises(CorruptError, match="too long"):
        parse_gate(text)


GATE = json.loads(gate_json("g", {"a": 1.0}, {"a": "<= 1"}, "accepted"))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "1",
        "[" * 60_000,
        json.dumps(GATE),
        '{"inputs":{"a":1.0,"a":1.0},"name":"g","thresholds":{},"verdict":""}',
        '{"inputs":{"a":NaN},"name":"g","thresholds":{},"verdict":""}',
        '{"inputs":{"a":1e999},"name":"g","thresholds":{},"verdict":""}',
        '{"inputs":{"a":1},"name":"g","thresholds":{},"verdict":""}',
        '{"inputs":{"a":' + "9" * 400 + '},"name":"g","thresholds":{},"verdict":""}',
        '{"inputs":{"a":true},"name":"g","thresholds":{},"verdict":""}',
        '{"inputs":{"a":"1"},"name":"g","thresholds":{},"verdict":""}',
        '{"inputs":[],"name":"g","thresholds":{},"verdict":""}',
        '{"inputs":{},"name":"g","thresholds":[["a","b"]],"verdict":""}',
        '{"inputs":{},"name":"g","thresholds":{"a":1},"verdict":""}',
        '{"inputs":{},"name":5,"thresholds":{},"verdict":""}',
        '{"inputs":{},"name":"g","thresholds":{},"verdict":null}',
        '{"inputs":{},"name":"g","thresholds":{}}',
        '{"inputs":{},"more":1,"name":"g","thresholds":{},"verdict":""}',
        '{"inputs":{},"name":"\\ud800","thresholds":{},"verdict":""}',
        "\ud800",
    ],
)
def test_malformed_gate_is_refused(text: str) -> None:
    with pytest.raises(CorruptError):
        parse_gate(text)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_changed_gate_is_read_or_refused(data: st.DataObject) -> None:
    text = list(gate_json("g", {"a": 1.0}, {"a": "<= 1"}, "accepted"))
    at = st.integers(0, len(text) - 1)
    for place, value in data.draw(st.lists(st.tuples(at, st.characters()), max_size=3)):
        text[place] = value
    changed = "".join(text)
    try:
        found = parse_gate(changed)
    except CorruptError:
        return
    assert found is not None
    assert gate_json(**found) == changed
