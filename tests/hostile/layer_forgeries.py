"""Layers whose digests are all true and whose content is hostile: who may write can do this."""

from __future__ import annotations

import hashlib
import random
import zlib
from typing import Any

import pyarrow as pa

from esper_ray.errors import CorruptError
from esper_ray.storage import row_codec
from tests.hostile.forgeries import (
    NUMBERS,
    PATHS,
    RAW,
    TENSORS,
    Change,
    changed_bytes,
    drop,
    forged_value,
    replace,
)
from tests.hostile.mutations import Mutant, Objects
from tests.hostile.stored_layer import heads
from tests.hostile.stored_run import body_of, sealed

Body = dict[str, Any]


def _entry(key: str, *values: Any) -> Change:
    """Another value in what the index says of some segment."""

    def change(rng: random.Random, body: Body) -> None:
        body["index"][rng.choice(sorted(body["index"]))][key] = rng.choice(values)

    return change


def _piece(at: int, *values: Any) -> Change:
    """Another value in some piece of some segment: [rows, first, last, offset, length, crc32,
    seeds]."""

    def change(rng: random.Random, body: Body) -> None:
        entry = body["index"][rng.choice(sorted(body["index"]))]
        rng.choice(entry["pieces"])[at] = rng.choice(values)

    return change


def _unlisted(rng: random.Random, body: Body) -> None:
    del body["index"][rng.choice(sorted(body["index"]))]


def _part_lost(rng: random.Random, body: Body) -> None:
    """A part that all rows of the snapshot need, and the index says nothing of it either."""
    names = [
        n for n, e in body["index"].items() if e["level"] == "full" and e["part"] != "rollback"
    ]
    name = rng.choice(sorted(names))
    del body["index"][name]
    body["segments"] = [ref for ref in body["segments"] if ref["name"] != name]


def _kinds_exchanged(rng: random.Random, body: Body) -> None:
    """The names of a table and of tensors exchanged."""
    tables = [ref for ref in body["segments"] if ref["file"].endswith("arrow")]
    tensors = [ref for ref in body["segments"] if not ref["file"].endswith("arrow")]
    one, other = rng.choice(tables), rng.choice(tensors)
    one["name"], other["name"] = other["name"], one["name"]


def _huge_rows(rng: random.Random, body: Body) -> None:
    """A number of rows that no memory holds, in the reference and in the index alike."""
    ref = rng.choice([r for r in body["segments"] if body["index"][r["name"]]["level"] != "seed"])
    ref["rows"] = rng.choice([2**31, 2**40, 2**62])
    entry = body["index"][ref["name"]]
    entry["pieces"] = [[ref["rows"], *entry["pieces"][0][1:]]]


def _huge_piece(rng: random.Random, body: Body) -> None:
    """A piece of a length that no memory holds, inside a size that no disk holds."""
    ref = rng.choice(body["segments"])
    ref["size"] = 2**62
    rng.choice(body["index"][ref["name"]]["pieces"])[3:5] = rng.choice(
        [[0, 2**40], [2**61, 8], [0, 2**61], [2**40, 2**31]]
    )


def _schema(part: str, at: int, *values: Any) -> Change:
    """Another name, type or width of some column or tensor of a part."""

    def change(rng: random.Random, body: Body) -> None:
        kind = "tables" if part in body["schema"]["tables"] else "tensors"
        told = rng.choice(body["schema"][kind][part])
        told[at] = rng.choice([value for value in values if value != told[at]])

    return change


def _column_lost(rng: random.Random, body: Body) -> None:
    table = rng.choice([body["schema"]["tables"]["state"], body["schema"]["tensors"]["weights"]])
    del table[rng.randrange(len(table))]


_JUNK: tuple[Any, ...] = (None, [], "x", {"url": "s3://x"}, 1.5)

CHANGES: dict[str, Change] = {
    "segment file": replace("segments", ..., "file", to=(*PATHS, 7, None)),
    "segment sha256": replace("segments", ..., "sha256", to=("", "0" * 64, "A" * 64, 1, None)),
    "segment size": replace("segments", ..., "size", to=(0, *NUMBERS)),
    "segment rows": replace("segments", ..., "rows", to=(0, *NUMBERS)),
    "segment name": replace("segments", ..., "name", to=("", "x" * 2000, 7, None, *PATHS[:4])),
    "segment field lost": drop("segments", ..., "size"),
    "segment lost": drop("segments", ...),
    "part lost": _part_lost,
    "kinds exchanged": _kinds_exchanged,
    "segments": replace("segments", to=(None, {}, "x", 1, [None], [[]], ["../x"])),
    "index": replace("index", to=_JUNK),
    "index without a segment": _unlisted,
    "level": _entry("level", "half", 1, None),
    "part": _entry("part", "../weights", "host", ["state"], None),
    "seq of a segment": _entry("seq", "2", None, 1.5, True),
    "pieces": _entry("pieces", [], None, "x", [[]], [[0, 0, 0, 0, 0, 0, []]], [[1] * 7]),
    "rows of a piece": _piece(0, 0, -1, 10**6, 2**62, "1", None, True),
    "offset of a piece": _piece(3, -1, 2**40, 2**63, "0", None),
    "length of a piece": _piece(4, -1, 2**40, 2**63, "0", None),
    "crc32 of a piece": _piece(5, -1, 2**32, 7, "0", None),
    "seeds of a piece": _piece(6, None, "x", [-1], ["1"], [1.5], {}),
    "rows that no memory holds": _huge_rows,
    "a piece that no memory holds": _huge_piece,
    "schema": replace("schema", to=(*_JUNK, {"tables": {}, "tensors": {}})),
    "column": _schema("state", 0, "seed_id", "../x", "", 7, None),
    "type of a column": _schema("state", 1, "object", "int8", "float64", 3, None),
    "width of a column": _schema("state", 2, 3, -1, 2**31, 2**62, "1", None, True),
    "type of a tensor": _schema("weights", 1, "object", "int8", "float64", 3, None),
    "shape of a tensor": _schema("weights", 2, [], [2**40], [2**31, 2], [-1], [1.5], "x", None),
    "column lost": _column_lost,
    "shard": replace("shard", to=_JUNK),
    "shard index": replace("shard", "index", to=(2, *NUMBERS)),
    "shard count": replace("shard", "count", to=(1, 3, *NUMBERS)),
    "seeds of a shard": replace(
        "shard", "seed_range", to=([], [0, 1], [7, 7], [-1, 45], "x", None)
    ),
    "writer": replace("writer", to=_JUNK),
    "incarnation": replace("writer", "incarnation", to=("1", -1, 2**70, None, True)),
    "kind": replace("kind", to=("run", "epoch", None, 1)),
    "step": replace("step", to=(-1, 2**70, "x", [], True, 1.5)),
    "time": replace("time", to=("yesterday", "", 7, None)),
    "layer": replace("layer_id", to=("encoder.4", 7, None, *PATHS)),
    "key of the layer": replace("layer_key", to=("0" * 16, 7, None, *PATHS)),
    "seq": replace("seq", to=(0, -1, 2**70, "1", None, True)),
    "run epoch": replace("run_epoch", to=(1, 0, -1, 2**70, "1", None, True)),
    "parent": replace("parent", to=(3, None, "x", {}, [None], [{}], [{"seq": "../x"}])),
    "sha256 of a parent": replace("parent", 0, "sha256", to=("0", 7, None, "A" * 64)),
    "number of a parent": replace("parent", 0, "seq", to=(-1, 2**70, "x", None, True)),
    "versions": replace("versions", to=(["2.13"], {"torch": 2}, None, 1)),
    "min_reader": replace("min_reader", to=(2, 2**70, "1", None, True, 1.0)),
    "format": replace("format", to=("other", None, 1)),
    **{
        f"{key} lost": drop(key)
        for key in ("segments", "index", "schema", "shard", "writer", "kind", "step", "time")
    },
    **{
        f"{key} lost": drop(key)
        for key in ("layer_id", "seq", "run_epoch", "parent", "versions", "format")
    },
}


def forged_manifest(rng: random.Random, objects: Objects) -> Mutant:
    """The last manifest of a shard with hostile content."""
    path = rng.choice(heads(objects))
    body = body_of(objects[path])
    name = rng.choice([*RAW, *CHANGES, *CHANGES, *CHANGES])
    if name in RAW:
        return Mutant(f"{path} with {name}", {path: RAW[name](body)}, forged=True)
    CHANGES[name](rng, body)
    return Mutant(f"{path} with another {name}", {path: sealed(body)}, forged=True)


# ---- segments ------------------------------------------------------------------------------------


def _replaced(objects: Objects, rng: random.Random, data: Any, what: str, legal: bool) -> Mutant:
    """Some segment of the last manifest of a shard with other bytes, and named as it is."""
    path = rng.choice(heads(objects))
    body = body_of(objects[path])
    ref = rng.choice(body["segments"])
    kind = ref["file"].rpartition(".")[2]
    name, new = data(kind, objects[f"segments/{ref['file']}"])
    digest, entry = hashlib.sha256(new).hexdigest(), body["index"][ref["name"]]
    file = f"sha256/{digest[:2]}/{digest}.{kind}"
    entry["pieces"] = _pieces(rng, kind, new, entry["pieces"])
    forged = ref | {"file": file, "sha256": digest, "size": len(new)}
    body["segments"] = [forged if r["name"] == ref["name"] else r for r in body["segments"]]
    changes: dict[str, bytes | None] = {f"segments/{file}": new, path: sealed(body)}
    # A block is bytes and nothing else: in pieces, any of them are some tensors.
    legal |= kind == "safetensors"
    return Mutant(f"{path}: {ref['name']} {what} {name}", changes, forged=True, legal=legal)


def _pieces(rng: random.Random, kind: str, data: bytes, pieces: list[Any]) -> list[Any]:
    """The pieces as they were, or where a reader of these bytes finds some, with a true crc32."""
    if rng.random() < 0.3:
        return pieces
    ranges = [(offset, length) for _, _, _, offset, length, _, _ in pieces]
    if kind == "arrow" and (found := _batches(data)):
        ranges = (found * len(pieces))[: len(pieces)]
    elif any(offset + length > len(data) for offset, length in ranges):
        ranges = [(0, len(data))] * len(pieces)
    return [
        [*piece[:3], at, size, zlib.crc32(data[at : at + size]), piece[6]]
        for piece, (at, size) in zip(pieces, ranges, strict=True)
    ]


def _batches(data: bytes) -> list[tuple[int, int]]:
    try:
        return list(row_codec._batch_ranges(data))
    except (pa.ArrowException, OSError, TypeError, ValueError, CorruptError):
        return []


def forged_segment(rng: random.Random, objects: Objects, tables: dict[str, bytes]) -> Mutant:
    """A segment replaced by a hostile one."""

    def data(kind: str, _: bytes) -> tuple[str, bytes]:
        payloads = tables if kind == "arrow" else TENSORS
        name = rng.choice(sorted(payloads))
        return name, payloads[name]

    return _replaced(objects, rng, data, "with", legal=False)


def forged_bytes(rng: random.Random, objects: Objects) -> Mutant:
    """A segment with some bytes changed."""

    def data(kind: str, whole: bytes) -> tuple[str, bytes]:
        return "changed", changed_bytes(rng, whole)

    return _replaced(objects, rng, data, "of some bytes", legal=True)


def mutant(rng: random.Random, objects: Objects, tables: dict[str, bytes]) -> Mutant:
    """One forged layer."""
    drawn = rng.random()
    if drawn < 0.4:
        return forged_manifest(rng, objects)
    if drawn < 0.6:
        return forged_value(rng, objects)
    if drawn < 0.8:
        return forged_segment(rng, objects, tables)
    return forged_bytes(rng, objects)
