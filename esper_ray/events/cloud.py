"""Events on the wire: CloudEvents 1.0 as structured JSON; transitions of a layer as Arrow in it."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pyarrow as pa

from esper_ray.errors import CorruptError, EventRefused, TooNewError
from esper_ray.events.arrow_reading import arrow_schema, read_columns
from esper_ray.events.event import Event, Kind, decoded, encoded
from esper_ray.events.log import SCHEMA, EventKind, Events

VERSION: Final = 1
MAX_BYTES: Final = 16 * 2**20
"""The largest event, encoded."""
MAX_ROWS: Final = 8192
"""Transitions in one event; more are told in several."""
COLUMNS: Final = (
    "sequence",
    "seed_id",
    "generation",
    "epoch",
    "blueprint_id",
    "checkpoint_id",
    "step",
    "from_state",
    "to_state",
    "strategy",
    "cause",
    "gate",
    "alpha",
    "score",
)
"""Columns of the event log that a batch of transitions carries; the others do not apply to it."""

JSON_TYPE: Final = "application/json"
ARROW_TYPE: Final = "application/vnd.apache.arrow.stream"
_TYPE = re.compile(r"io\.esper_ray\.([a-z.]+)\.v([1-9][0-9]{0,3})")
_RUN = re.compile(r"[a-z0-9-]{1,64}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}")
_BATCH = {name: SCHEMA[name] for name in COLUMNS}
_NUMBERS = ("shard", "runepoch", "incarnation", "sequence")
_DEEPEST = 16


def encode(event: Event) -> bytes:
    """The event as structured JSON; EventRefused if no reader would take it."""
    envelope: dict[str, Any] = {
        "specversion": "1.0",
        "id": event.id,
        "source": _source(event.run, event.layer),
        "type": f"io.esper_ray.{event.kind}.v{VERSION}",
        "time": event.time,
        **{name: str(n) for name, n in zip(_NUMBERS, event.numbers, strict=True)},
    }
    if event.seed_id is not None:
        envelope["subject"] = f"seed/{event.seed_id}"
    try:
        if isinstance(event.data, Events):
            envelope["datacontenttype"] = ARROW_TYPE
            envelope["data_base64"] = base64.b64encode(_arrow(event)).decode()
        else:
            envelope["datacontenttype"] = JSON_TYPE
            envelope["data"] = _checked(event.data)
        data = json.dumps(
            envelope, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        ).encode()
        decode(data)
    except (CorruptError, TypeError, ValueError) as error:
        raise EventRefused(f"the event {event.id[:200]} cannot be told: {error}") from error
    return data


def decode(data: bytes) -> Event:
    """The event of a message that nobody vouches for.

    TooNewError for a version that this program does not know, CorruptError for anything else that
    `encode` does not write.
    """
    if len(data) > MAX_BYTES:
        raise CorruptError(f"an event of {len(data)} bytes is larger than {MAX_BYTES}")
    try:
        envelope = json.loads(data.decode(), parse_constant=_no_constant)
        if not isinstance(envelope, dict) or envelope.get("specversion") != "1.0":
            raise ValueError("it is no CloudEvent of version 1.0")
        event = _event(envelope)
        if event.id != envelope.get("id"):
            raise ValueError(f"its id is not {event.id}")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CorruptError(f"an event cannot be read: {error}") from error
    return event


def single(batch: Event, row: int) -> Event:
    """One row of a batch of transitions as an event of its own, its data a table."""
    if not isinstance(batch.data, Events):
        raise TypeError(f"{batch.kind} is no batch")
    values = {
        name: column[row] if isinstance(column, list) else column[row].item()
        for name, column in batch.data.columns.items()
    }
    told: dict[str, Any] = {name: _finite(values[name]) for name in COLUMNS}
    told["gate"] = json.loads(values["gate"]) if values["gate"] else None
    about = {"run": batch.run, "layer": batch.layer, "shard": batch.shard}
    return Event(
        kind=batch.kind,
        run=batch.run,
        layer=batch.layer,
        run_epoch=batch.run_epoch,
        sequence=int(values["sequence"]),
        time=batch.time,
        data={**about, **told},
        shard=batch.shard,
        incarnation=batch.incarnation,
        seed_id=int(values["seed_id"]),
    )


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _source(run: str, layer: str) -> str:
    return f"esper-ray://{run}/{encoded(layer)}"


def _event(envelope: Mapping[str, Any]) -> Event:
    kind = _kind(envelope["type"])
    run, _, word = str(envelope["source"]).removeprefix("esper-ray://").partition("/")
    layer = decoded(word)
    if not _RUN.fullmatch(run) or envelope["source"] != _source(run, layer):
        raise ValueError(f"its source is {envelope['source']!r}")
    if not _TIME.fullmatch(envelope["time"]):
        raise ValueError(f"its time is {envelope['time']!r}")
    shard, run_epoch, incarnation, sequence = (_number(envelope[name]) for name in _NUMBERS)
    subject = envelope.get("subject")
    seed_id = None if subject is None else _number(subject.removeprefix("seed/"))
    data: Mapping[str, Any] | Events
    if envelope["datacontenttype"] == ARROW_TYPE:
        numbers = (shard, run_epoch, incarnation)
        data = _columns(base64.b64decode(envelope["data_base64"], validate=True), layer, numbers)
    elif envelope["datacontenttype"] == JSON_TYPE:
        data = _checked(envelope["data"])
    else:
        raise ValueError(f"its data are {envelope['datacontenttype']!r}")
    return Event(
        kind, run, layer, run_epoch, sequence, envelope["time"], data, shard, incarnation, seed_id
    )


def _kind(name: str) -> Kind:
    match = _TYPE.fullmatch(name)
    if match is None:
        raise ValueError(f"its type is {name!r}")
    if int(match[2]) > VERSION or match[1] not in {*Kind}:
        raise TooNewError(f"events of type {name!r} are not known here", "update esper-ray")
    return Kind(match[1])


def _number(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{text!r} is no number")
    return int(text)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _checked(value: Any) -> dict[str, Any]:
    """A table that comes back from JSON as it is: no tuple, no number as a key."""
    if not isinstance(value, dict):
        raise TypeError(f"its data are {type(value).__name__}, no table")
    _check(value, 0)
    return value


def _check(value: Any, depth: int) -> None:
    if depth > _DEEPEST:
        raise ValueError("its data are nested too deeply")
    if type(value) is dict:
        if any(type(key) is not str for key in value):
            raise TypeError("its data have a key that is no text")
        for item in value.values():
            _check(item, depth + 1)
    elif type(value) is list:
        for item in value:
            _check(item, depth + 1)
    elif value is not None and type(value) not in (str, int, float, bool):
        raise TypeError(f"its data hold a {type(value).__name__}")


# ---- a batch of transitions ---------------------------------------------------------------------


def _batch_schema(layer: str, numbers: tuple[int, int, int]) -> Any:
    shard, run_epoch, incarnation = map(str, numbers)
    about = {"layer": layer, "shard": shard, "runepoch": run_epoch, "incarnation": incarnation}
    return arrow_schema(_BATCH, {"esper-events": str(VERSION), **about})


def _arrow(event: Event) -> bytes:
    rows = event.data
    if not isinstance(rows, Events) or not 0 < len(rows) <= MAX_ROWS:
        raise ValueError(f"a batch has 1 to {MAX_ROWS} rows")
    if any(rows.columns[name] != [event.layer] * len(rows) for name in ("layer",)):
        raise ValueError("its rows are of another layer")
    schema = _batch_schema(event.layer, (event.shard, event.run_epoch, event.incarnation))
    arrays = [pa.array(rows.columns[f.name], type=f.type, from_pandas=False) for f in schema]
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=None)
    with pa.ipc.new_stream(sink, schema, options=options) as writer:
        writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _columns(data: bytes, layer: str, numbers: tuple[int, int, int]) -> Events:
    columns = read_columns(pa.py_buffer(data), _BATCH, _batch_schema(layer, numbers), "an event")
    rows = len(columns["sequence"])
    if not 0 < rows <= MAX_ROWS:
        raise CorruptError(f"an event has {rows} rows")
    replants = np.array([cause == "REPLANT" for cause in columns["cause"]]) & (
        columns["to_state"] == 0
    )
    kind = np.where(replants, EventKind.REPLANT, EventKind.TRANSITION)
    given = {name: columns[name] for name in COLUMNS if name not in ("sequence", "epoch", "step")}
    return Events.build(
        kind,  # type: ignore[arg-type]
        layer,
        columns["sequence"],
        columns["epoch"],
        columns["step"],
        rows,
        **given,
    )
