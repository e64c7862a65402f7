"""The event log: what happened in a run as columns, and as one Arrow file for each commit."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from esper_ray.errors import CorruptError
from esper_ray.events.gate import MAX_TEXT_BYTES, Gate, gate_json, parse_gate

__all__ = [
    "SCHEMA",
    "EventKind",
    "Events",
    "Gate",
    "decode",
    "encode",
    "gate_json",
    "parse_gate",
]

VERSION: Final = 1
ROWS_PER_BATCH: Final = 65_536


class EventKind(IntEnum):
    """What one event tells."""

    EPOCH = 0
    """A lifecycle epoch of a layer ended: seed_id is -1, `errors` is the layer's seed count."""
    SIGNALS = 1
    """What the strategy of a seed in GRAFTING consumed in this epoch."""
    ERRORS = 2
    """Errors of a seed counted since the epoch before."""
    METRICS = 3
    """Metrics recorded for a seed."""
    TRANSITION = 4
    """A transition that was applied."""
    REPLANT = 5
    """A new generation of a seed began."""
    REFUSAL = 6
    """A refused request, of a person or at the epoch of a commit; it changed nothing."""
    FAULT = 7
    """Something went wrong and was dealt with: `cause` names it, the gate's verdict tells more."""


SCHEMA: Final[Mapping[str, str]] = MappingProxyType(
    {
        "sequence": "uint64",
        "kind": "uint8",
        "layer": "utf8",
        "epoch": "int32",
        "step": "int64",
        "seed_id": "int32",
        "generation": "int32",
        "from_state": "int8",
        "to_state": "int8",
        "cause": "utf8",
        "strategy": "int8",
        "blueprint_id": "int32",
        "checkpoint_id": "int32",
        "alpha": "float32",
        "score": "float32",
        "gate": "utf8",
        "weight_drift": "float64",
        "performance_delta": "float64",
        "loss_variance": "float64",
        "gradient_norm": "float64",
        "accuracy_variance": "float64",
        "errors": "int32",
        "loss": "float32",
        "accuracy": "float32",
        "stability": "float32",
        "efficiency": "float32",
        "valid": "uint8",
    }
)
"""Columns of the log and their types; "utf8" is a list of str, the others are numpy's."""

_TEXT = "utf8"
_NOT_APPLICABLE: Mapping[str, Any] = {"f": math.nan, "i": -1, "u": 0, _TEXT: ""}
_METADATA = {b"esper-log": str(VERSION).encode()}
_ARROW_SCHEMA = pa.schema(
    [pa.field(name, pa.type_for_alias(kind), nullable=False) for name, kind in SCHEMA.items()],
    metadata=_METADATA,
)
_HEAD, _TAIL = b"ARROW1\0\0", b"ARROW1"
# Arrow reports bad input by its own type and by most of these.
_ARROW_ERRORS = (pa.ArrowException, ValueError, TypeError, KeyError, OSError, MemoryError)


@dataclass(frozen=True, slots=True)
class Events:
    """Events in their order: every column of SCHEMA, all of one length."""

    columns: Mapping[str, Any]

    def __post_init__(self) -> None:
        if list(self.columns) != list(SCHEMA):
            raise ValueError(f"events have the columns {list(SCHEMA)}, got {list(self.columns)}")
        for name, values in self.columns.items():
            text = SCHEMA[name] == _TEXT
            right = isinstance(values, list) if text else values.dtype == np.dtype(SCHEMA[name])
            if not right or not (text or values.ndim == 1):
                raise ValueError(f"column {name!r} is not one of {SCHEMA[name]}")
        lengths = {name: len(values) for name, values in self.columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"the columns differ in length: {lengths}")

    @classmethod
    def build(
        cls,
        kind: EventKind,
        layer: str,
        sequence: Any,
        epoch: int,
        step: int,
        rows: int,
        **given: Any,
    ) -> Events:
        """`rows` events; a scalar stands in each of them, a column not given does not apply."""
        if unknown := sorted(given.keys() - SCHEMA.keys()):
            raise TypeError(f"events have no columns {unknown}")
        given |= {"kind": kind, "layer": layer, "sequence": sequence, "epoch": epoch, "step": step}
        return cls({name: _column(name, given.get(name), rows) for name in SCHEMA})

    @classmethod
    def empty(cls) -> Events:
        """No events."""
        return cls.build(EventKind.EPOCH, "", 0, 0, 0, rows=0)

    @classmethod
    def concatenate(cls, parts: Sequence[Events]) -> Events:
        """The events of all parts, one part after another."""
        return cls(
            {
                name: [value for part in parts for value in part.columns[name]]
                if kind == _TEXT
                else np.concatenate([np.empty(0, kind), *(part.columns[name] for part in parts)])
                for name, kind in SCHEMA.items()
            }
        )

    def take(self, rows: NDArray[Any]) -> Events:
        """The events where a mask is True, or at an array of indices, in its order."""
        chosen = np.arange(len(self))[rows]
        return Events(
            {
                name: [values[i] for i in chosen.tolist()]
                if isinstance(values, list)
                else values[chosen]
                for name, values in self.columns.items()
            }
        )

    def of(self, layer: str, seed_id: int | None = None) -> Events:
        """The events of a layer, or of one seed of it."""
        mask = np.array([name == layer for name in self.columns["layer"]], dtype=bool)
        return self.take(mask if seed_id is None else mask & (self.columns["seed_id"] == seed_id))

    def __len__(self) -> int:
        return len(self.columns["kind"])


def _column(name: str, value: Any, rows: int) -> Any:
    kind = SCHEMA[name]
    if value is None:
        value = _NOT_APPLICABLE[_TEXT if kind == _TEXT else np.dtype(kind).kind]
    if kind == _TEXT:
        return [value] * rows if isinstance(value, str) else list(value)
    given = np.asarray(value)
    # A loss beyond float32 is stored as infinite; NaN in a column of integers is refused below.
    with np.errstate(over="ignore", invalid="ignore"):
        cast = given.astype(kind)
    if cast.dtype.kind != "f" and not np.array_equal(cast, given):
        raise ValueError(f"column {name!r} of {kind} cannot hold {value!r}")
    return np.broadcast_to(cast, rows).copy()


def _problem(events: Events) -> str | None:
    sequence, kinds = events.columns["sequence"], events.columns["kind"]
    if not np.all(sequence[1:] >= sequence[:-1]):
        return "the sequence falls"
    if len(kinds) and kinds.max() > max(EventKind):
        return f"{kinds.max()} is no kind of event"
    for name, values in events.columns.items():
        # No character has more than four bytes, so that most texts need no encoding to pass.
        if isinstance(values, list) and any(
            len(text) * 4 > MAX_TEXT_BYTES and len(text.encode()) > MAX_TEXT_BYTES
            for text in values
        ):
            return f"a text in column {name!r} has more than {MAX_TEXT_BYTES} bytes"
    return None


def encode(events: Events) -> bytes:
    """The events as one Arrow file; ValueError if no reader would take them.

    It is not compressed, so that no stored file is larger in memory than on disk.
    """
    if problem := _problem(events):
        raise ValueError(f"these events cannot be stored: {problem}")
    arrays = [
        pa.array(events.columns[field.name], type=field.type, from_pandas=False)
        for field in _ARROW_SCHEMA
    ]
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=None)
    with pa.ipc.new_file(sink, _ARROW_SCHEMA, options=options) as writer:
        writer.write_table(pa.Table.from_arrays(arrays, schema=_ARROW_SCHEMA), ROWS_PER_BATCH)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def decode(data: bytes) -> Events:
    """The events of stored bytes; CorruptError unless they are of exactly this format."""
    try:
        batches = list(_read_batches(data))
        events = Events(
            {name: _join(kind, [b.column(name) for b in batches]) for name, kind in SCHEMA.items()}
        )
    except (*_ARROW_ERRORS, struct.error) as error:
        raise CorruptError(f"an event log cannot be read: {error}") from error
    if problem := _problem(events):
        raise CorruptError(f"an event log is damaged: {problem}")
    return events


def _read_batches(data: bytes) -> Iterator[Any]:
    if not (data.startswith(_HEAD) and data.endswith(_TAIL)):
        raise CorruptError("an event log does not begin and end as an Arrow file")
    # The stream inside the file, not its footer: every message is seen once, in order.
    messages = iter(
        pa.ipc.MessageReader.open_stream(pa.BufferReader(pa.py_buffer(data).slice(len(_HEAD))))
    )
    first = next(messages, None)
    if first is None or first.type != "schema":
        raise CorruptError("an event log does not begin with its schema")
    _check_schema(pa.ipc.read_schema(first))
    for message in messages:
        if message.type != "record batch":
            raise CorruptError(f"an event log holds a {message.type}")
        if _is_compressed(message.metadata.to_pybytes()):
            raise CorruptError("an event log is compressed, which is refused")
        batch = pa.ipc.read_record_batch(message, _ARROW_SCHEMA)
        batch.validate(full=True)
        if batch.num_rows > ROWS_PER_BATCH or any(column.null_count for column in batch.columns):
            raise CorruptError("an event log has a batch that is too long, or nulls")
        yield batch


def _check_schema(found: Any) -> None:
    version = (found.metadata or {}).get(b"esper-log", b"")
    if version.isdigit() and int(version) > VERSION:
        raise CorruptError("an event log was written by a newer version", "update esper-ray")
    if not found.equals(_ARROW_SCHEMA, check_metadata=True):
        raise CorruptError(f"an event log has other columns or metadata: {str(found)[:500]}")


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
    if kind == _TEXT:
        return [text for array in arrays for text in array.to_pylist()]
    return np.concatenate([np.empty(0, kind), *(array.to_numpy() for array in arrays)])
