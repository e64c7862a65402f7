"""Stores whose digests are all true and whose content is hostile: who may write can do this."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from esper_ray.growth import snapshot
from esper_ray.storage import codec
from tests.hostile.mutations import Mutant, Objects, flip_bits
from tests.hostile.stored_run import body_of, commits, sealed, sealed_text

PATHS = (
    "../../etc/passwd",
    "/etc/passwd",
    "sha256/../../FORMAT.json",
    "sha256/ab/../ab/x.arrow",
    "s3://bucket/other/run",
    "file:///etc/passwd",
    "..\\..\\windows",
    "os:system",
    "con\0trol",
    "",
)
NUMBERS: tuple[Any, ...] = (-1, 2**31, 2**62, 2**63, 10**60, True, 1.5, -0.0, "12", None, [], {})
VALUES: tuple[Any, ...] = (
    *PATHS,
    *NUMBERS,
    [[]],
    {"a": {}},
    "\ud800",
    "x" * 5000,
    "__import__('os').system('id')",
)


def _deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


# ---------------------------------------------------------------- manifests


def _with_text(text: str) -> Callable[[dict[str, Any]], bytes]:
    """A body with one more member, written as is: what no JSON writer of ours would write."""

    def write(body: dict[str, Any]) -> bytes:
        kept = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)[1:-1]

        def sealed_as(digest: str | None) -> str:
            seal = f',"self_sha256":"{digest}"' if digest else ""
            return f"{{{kept}{seal},{text}}}"

        return sealed_text(sealed_as)

    return write


RAW: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "a key twice": _with_text('"zz":1,"zz":2'),
    "step twice": _with_text('"step":0'),
    "NaN": _with_text('"zz":NaN'),
    "infinity": _with_text('"zz":-Infinity'),
    "an overflowing float": _with_text('"zz":1e999'),
    "a number of 5000 digits": _with_text(f'"zz":{"9" * 5000}'),
    "65 levels": _with_text(f'"zz":{"[" * 65}{"]" * 65}'),
    "100,000 levels": _with_text(f'"zz":{"[" * 100_000}{"]" * 100_000}'),
    "17 MiB": _with_text(f'"zz":"{"x" * 17 * 2**20}"'),
    "a surrogate": _with_text('"zz":"\\ud800"'),
    "spaces": lambda body: sealed(body).replace(b",", b", ", 1),
    "a byte order mark": lambda body: b"\xef\xbb\xbf" + sealed(body),
    "UTF-16": lambda body: sealed(body).decode().encode("utf-16"),
    "a list": lambda body: sealed([body]),
    "a string": lambda _: sealed("body"),
    "null": lambda _: sealed(None),
}

Change = Callable[[random.Random, dict[str, Any]], None]


def replace(*keys: Any, to: tuple[Any, ...]) -> Change:
    """Another value at a place; `...` is any of the segments."""

    def change(rng: random.Random, body: dict[str, Any]) -> None:
        inside: Any = body
        *way, last = (rng.randrange(len(body["segments"])) if k is ... else k for k in keys)
        for key in way:
            inside = inside[key]
        value = rng.choice(
            [v for v in to if v != inside[last] or type(v) is not type(inside[last])]
        )
        inside[last] = value

    return change


def drop(*keys: Any) -> Change:
    """No value at a place; `...` is any of the segments."""

    def change(rng: random.Random, body: dict[str, Any]) -> None:
        inside: Any = body
        *way, last = (rng.randrange(len(body["segments"])) if k is ... else k for k in keys)
        for key in way:
            inside = inside[key]
        del inside[last]

    return change


def _segment_lost(rng: random.Random, body: dict[str, Any]) -> None:
    del body["segments"][
        rng.randrange(len(body["segments"]) - 1)
    ]  # the last are the losses, which no resume needs


def _segment_renamed(rng: random.Random, body: dict[str, Any]) -> None:
    ref = body["segments"][rng.randrange(len(body["segments"]) - 1)]  # but the losses
    ref["name"] = rng.choice(["", "x" * 2000, 7, None, *PATHS[:4]])


def _segment_rows(rng: random.Random, body: dict[str, Any]) -> None:
    ref = body["segments"][rng.randrange(len(body["segments"]) - 1)]  # but the losses
    ref["rows"] = rng.choice([v for v in NUMBERS if v != ref["rows"] or isinstance(v, bool)])


def _segment_twice(rng: random.Random, body: dict[str, Any]) -> None:
    body["segments"].append(dict(rng.choice(body["segments"])))


def _extra_field(rng: random.Random, body: dict[str, Any]) -> None:
    rng.choice(body["segments"])[rng.choice(["url", "protocol", "module"])] = rng.choice(PATHS)


def _kind(ref: dict[str, Any]) -> str:
    """Weights and the copies for a rollback are of one form: only a signature tells them apart."""
    part = str(ref["name"]).rpartition("/")[2]
    return "weights" if part == "rollback" else part


def _other_kind(rng: random.Random, body: dict[str, Any]) -> None:
    """Two references exchanged whose contents are of different kinds."""
    one, other = rng.sample(body["segments"], 2)
    while _kind(one) == _kind(other):
        one, other = rng.sample(body["segments"], 2)
    one["name"], other["name"] = other["name"], one["name"]


CHANGES: dict[str, Change] = {
    "segment file": replace("segments", ..., "file", to=(*PATHS, 7, None)),
    "segment sha256": replace("segments", ..., "sha256", to=("", "0" * 64, "A" * 64, 1, None)),
    "segment size": replace("segments", ..., "size", to=(0, *NUMBERS)),
    "segment rows": _segment_rows,
    "segment name": _segment_renamed,
    "segment field lost": drop("segments", ..., "size"),
    "segment lost": _segment_lost,
    "segment twice": _segment_twice,
    "segment with more fields": _extra_field,
    "segments of another kind": _other_kind,
    "segments": replace("segments", to=(None, {}, "x", 1, [None], [[]], ["../x"])),
    "log file": replace("log", "file", to=(*PATHS, 7)),
    "log size": replace("log", "size", to=(0, *NUMBERS)),
    "log": replace("log", to=(None, [], "../x", {"url": "s3://x"})),
    "min_reader": replace("min_reader", to=(2, 2**70, "1", None, True, 1.0)),
    "format": replace("format", to=("other", None, 1)),
    "kind": replace("kind", to=("epoch", "open", None, 1)),
    "seq": replace("seq", to=(0, -1, 2**70, "1", None, True)),
    "model factory": replace("config", "model.factory", to=("os:system", "subprocess:run")),
    "blueprint": replace("config", "seeds.blueprint", to=PATHS),
    "config": replace("config", to=(None, [], "x", 1, {})),
    "epoch": replace("epoch", to=(-1, 2**70, 10**60, "x", None, [], {}, True)),
    "step": replace("step", to=(-1, 2**70, 10**60, "x", None, [], {}, True)),
    "coordinator": replace("coordinator", to=(None, [], "x", 1, {})),
    "gate losses": replace("coordinator", "gate_losses", to=(1, "x", [[]], ["x"], [None], None)),
    "outcomes": replace("coordinator", "outcomes", to=(1, None, "{", "[]", '{"linear":1}')),
    **{f"{key} lost": drop(key) for key in ("segments", "epoch", "step", "config", "coordinator")},
    **{f"{key} lost": drop(key) for key in ("seq", "kind", "format")},
}


def _commit(objects: Objects) -> tuple[str, dict[str, Any]]:
    path = commits(objects)[0]
    return path, body_of(objects[path])


def forged_manifest(rng: random.Random, objects: Objects) -> Mutant:
    """The newest commit with hostile content."""
    path, body = _commit(objects)
    name = rng.choice([*RAW, *CHANGES, *CHANGES])
    if name in RAW:
        return Mutant(f"manifest with {name}", {path: RAW[name](body)}, forged=True)
    CHANGES[name](rng, body)
    return Mutant(f"manifest with another {name}", {path: sealed(body)}, forged=True)


def _places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inside in items:
        yield (*way, key)
        if isinstance(inside, dict | list):
            yield from _places(inside, (*way, key))


def forged_value(rng: random.Random, objects: Objects) -> Mutant:
    """Any record with any value, at any depth, lost or replaced."""
    path = rng.choice([p for p in sorted(objects) if p.endswith(".json")])
    body = body_of(objects[path])
    *way, last = rng.choice(list(_places(body)))
    inside: Any = body
    for key in way:
        inside = inside[key]
    if rng.random() < 0.3:
        del inside[last]
    else:
        inside[last] = rng.choice(VALUES)
    name = f"{path} with another {'.'.join(map(str, (*way, last)))}"
    return Mutant(name, {path: sealed(body)}, forged=True, legal=True)


# ---------------------------------------------------------------- segments


def tensors_file(header: object, body: bytes = b"\0" * 64) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _entry(shape: Any = (4,), offsets: Any = (0, 16), dtype: Any = "F32", **more: Any) -> Any:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


TENSORS: dict[str, bytes] = {
    "a key twice": tensors_file(b'{"a":%b,"a":%b}' % ((json.dumps(_entry()).encode(),) * 2)),
    "overlapping offsets": tensors_file({"a": _entry(), "b": _entry(offsets=(8, 24))}, bytes(24)),
    "negative offsets": tensors_file({"a": _entry(offsets=(-16, 0))}),
    "reversed offsets": tensors_file({"a": _entry(offsets=(16, 0))}),
    "offsets beyond the end": tensors_file({"a": _entry(offsets=(2**40, 2**40 + 16))}),
    "a hole": tensors_file({"a": _entry(offsets=(16, 32))}, bytes(32)),
    "bytes of no tensor": tensors_file({"a": _entry()}, bytes(64)),
    "a shape of 2**80": tensors_file({"a": _entry(shape=(2**40, 2**40))}),
    "a shape of 2**40": tensors_file({"a": _entry(shape=(2**40,), offsets=(0, 2**42))}),
    "a negative shape": tensors_file({"a": _entry(shape=(-4, -1))}),
    "a shape of floats": tensors_file({"a": _entry(shape=(4.0,))}),
    "a shape of 100,000 ones": tensors_file({"a": _entry(shape=[1] * 100_000, offsets=(0, 4))}),
    "an unknown dtype": tensors_file({"a": _entry(dtype="Q99")}),
    "a dtype list": tensors_file({"a": _entry(dtype=["F32"])}),
    "NaN in metadata": tensors_file(b'{"__metadata__":{"a":NaN}}', b""),
    "metadata": tensors_file({"__metadata__": {"factory": "os:system"}, "a": _entry()}, bytes(16)),
    "more fields": tensors_file({"a": _entry(url="s3://x")}, bytes(16)),
    "a header of 2**63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header beyond the end": struct.pack("<Q", 100) + b"{}",
    "a deep header": tensors_file(b'{"a":%b}' % (b"[" * 100_000)),
    "a list for a header": tensors_file([]),
    "no bytes": b"",
    "a pickle": b"\x80\x04cos\nsystem\n(X\x02\x00\x00\x00idtR.",
    "a zip": b"PK\x03\x04" + bytes(60),
}


Schema = Mapping[str, tuple[Any, int]]

_EVENTS: Schema = {name: (np.dtype(np.int32), 0) for name in ("seed_id", "event_no")}
STATE: Schema = snapshot.STATE_SCHEMA
LAYER_STATE: Schema = {**_EVENTS, **{n: s for n, s in STATE.items() if n != "seed_id"}}
"""Columns of a layer's state in a commit of a run, and in the log of the layer."""


def _state_batch(rows: int, schema: Schema) -> Any:
    columns = {n: np.zeros((rows, w) if w else rows, d) for n, (d, w) in schema.items()}
    arrays = [codec._to_arrow(values) for values in columns.values()]
    return pa.record_batch(arrays, schema=codec._schema(schema))


def _arrow(batch: Any, compression: str | None = "zstd") -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _nested(levels: int) -> Any:
    kind = pa.int32()
    for _ in range(levels):
        kind = pa.list_(kind)
    return pa.record_batch([pa.array([None], kind)], names=["seed_id"])


def arrow_files(state: Schema = STATE) -> dict[str, bytes]:
    """Hostile tables; made where memory is not measured."""
    ids = pa.array(np.zeros(4, np.int32))
    words = pa.array(["a", "b", "a", "b"]).dictionary_encode()
    return {
        "a bomb of 200 MB": _arrow(_state_batch(1_300_000, state)),
        "an lz4 bomb": _arrow(_state_batch(200_000, state), "lz4"),
        "no compression": _arrow(_state_batch(4, state), None),
        "a dictionary": _arrow(pa.record_batch([words], names=["seed_id"])),
        "other columns": _arrow(pa.record_batch([ids], names=["../../x"])),
        "no rows": _arrow(_state_batch(0, state)),
        "500 levels": _arrow(_nested(60)),
        "nulls": _arrow(pa.record_batch([pa.nulls(4, pa.int32())], names=["seed_id"])),
        "metadata": _arrow(
            _state_batch(4, state).replace_schema_metadata({"factory": "os:system"})
        ),
        "no bytes": b"",
        "a magic alone": b"ARROW1\0\0",
        "a stream of 2 GiB": b"ARROW1\0\0" + struct.pack("<Ii", 0xFFFFFFFF, 2**31 - 8),
    }


def _replaced(objects: Objects, name: str, kind: str, ref: dict[str, Any], data: bytes) -> Mutant:
    path, body = _commit(objects)
    digest = hashlib.sha256(data).hexdigest()
    if kind == "log":
        target, body["log"] = body["log"]["file"], ref | {"sha256": digest, "size": len(data)}
        changes: dict[str, bytes | None] = {f"log/{target}": data}
    else:
        file = f"sha256/{digest[:2]}/{digest}.{kind}"
        new = ref | {"file": file, "sha256": digest, "size": len(data)}
        body["segments"] = [new if r["name"] == ref["name"] else r for r in body["segments"]]
        changes = {f"segments/{file}": data}
    return Mutant(name, changes | {path: sealed(body)}, forged=True)


def forged_segment(rng: random.Random, objects: Objects, tables: dict[str, bytes]) -> Mutant:
    """A segment of the newest commit replaced by a hostile one, and named as it is."""
    _, body = _commit(objects)
    ref = rng.choice([r for r in body["segments"] if r["name"] != "metrics"])
    kind = ref["file"].rpartition(".")[2]
    payloads = tables if kind == "arrow" else TENSORS
    name = rng.choice(sorted(payloads))
    return _replaced(objects, f"{ref['name']} with {name}", kind, ref, payloads[name])


def changed_bytes(rng: random.Random, whole: bytes, *, lengths: bool = True) -> bytes:
    """Other bytes of a segment: some bits flipped, or any length that a buffer may declare."""
    if lengths and rng.random() < 0.3:
        at = rng.randrange(0, len(whole) - 8, 8)
        size = rng.choice([-1, -2, 2**31, 2**40, 2**62, 2**63 - 1])
        data = whole[:at] + struct.pack("<q", size) + whole[at + 8 :]
        if data != whole:
            return data
    head = min(len(whole), rng.choice([64, 512, 2**20]))  # headers are where decoders decide
    return flip_bits(rng, whole[:head]) + whole[head:]


def forged_bytes(rng: random.Random, objects: Objects) -> Mutant:
    """A segment of the newest commit with some bytes changed, and named as it is."""
    _, body = _commit(objects)
    ref = rng.choice([*body["segments"], body["log"]])
    kind = ref["file"].rpartition(".")[2] if "name" in ref else "log"
    path = f"log/{ref['file']}" if kind == "log" else f"segments/{ref['file']}"
    data = changed_bytes(rng, objects[path], lengths=kind != "log")
    name = f"bytes of {ref.get('name', 'the log')} changed"
    forged = _replaced(objects, name, kind, ref, data)
    return Mutant(forged.name, forged.changes, forged=True, legal=True)


def mutant(rng: random.Random, objects: Objects, tables: dict[str, bytes]) -> Mutant:
    """One forged store."""
    drawn = rng.random()
    if drawn < 0.35:
        return forged_manifest(rng, objects)
    if drawn < 0.6:
        return forged_value(rng, objects)
    if drawn < 0.8:
        return forged_segment(rng, objects, tables)
    return forged_bytes(rng, objects)
