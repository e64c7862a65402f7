"""The manifests of a layer's log: where they lie, what they say, and how they are checked."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal

from esper_ray.errors import CorruptError
from esper_ray.storage import manifest, objects
from esper_ray.storage.filesystem import Root
from esper_ray.storage.layer_rows import LayerSchema
from esper_ray.storage.manifest import SegmentRef
from esper_ray.storage.replica import Replica
from esper_ray.storage.row_codec import Encoded, Piece

Level = Literal["full", "delta", "seed"]

EPOCH_FOLDER: Final = re.compile(r"e([0-9]{8})")
SHARD_FOLDER: Final = re.compile(r"s([0-9]{4})")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_LEVELS: Final = ("full", "delta", "seed")


def layer_key(layer_id: str) -> str:
    """What names a layer in paths: 16 hex digits."""
    return hashlib.sha256(layer_id.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class ShardId:
    """Shard `index` of `count`; it owns seeds first <= id < stop of its layer."""

    index: int
    count: int
    first: int
    stop: int

    def __post_init__(self) -> None:
        numbers = (self.index, self.count, self.first, self.stop)
        if any(type(n) is not int for n in numbers) or not 0 <= self.index < self.count <= 10_000:
            raise ValueError(f"shard {self.index!r} of {self.count!r} cannot be")
        if not 0 <= self.first < self.stop < 2**31:
            raise ValueError(f"a shard cannot own seeds {self.first} to {self.stop}")

    @classmethod
    def whole(cls, num_seeds: int) -> ShardId:
        """The only shard of a layer."""
        return cls(0, 1, 0, num_seeds)

    @classmethod
    def of(cls, num_seeds: int, count: int) -> list[ShardId]:
        """`count` shards that divide a layer's seeds as evenly as can be."""
        bounds = [num_seeds * n // count for n in range(count + 1)]
        return [cls(n, count, bounds[n], bounds[n + 1]) for n in range(count)]

    def to_json(self) -> dict[str, Any]:
        """The shard as JSON values."""
        return {
            "index": self.index,
            "count": self.count,
            "seed_range": [self.first, self.stop],
        }


def shard_folder(key: str, run_epoch: int, shard: int) -> str:
    """The folder of one shard's manifests below the storage prefix."""
    return f"layers/{key}/e{run_epoch:08d}/s{shard:04d}"


def shard_path(key: str, run_epoch: int, shard: int, seq: int) -> str:
    """Where manifest `seq` of one shard lies below the storage prefix."""
    return f"{shard_folder(key, run_epoch, shard)}/{seq:020d}.json"


@dataclass(frozen=True, slots=True)
class ManifestRef:
    """One manifest by number and digest, as a run commit or a later manifest pins it."""

    run_epoch: int
    shard: int
    seq: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """The reference as JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_json(cls, value: object) -> ManifestRef:
        """Read a reference that nobody vouches for; CorruptError unless every field is right."""
        if not isinstance(value, dict) or value.keys() != set(cls.__slots__):
            raise CorruptError("a reference to a layer's manifest is malformed")
        numbers = [value[name] for name in ("run_epoch", "shard", "seq")]
        if any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
            raise CorruptError(f"a reference to a layer's manifest has the numbers {numbers!r}")
        if type(value["sha256"]) is not str or not _SHA256.fullmatch(value["sha256"]):
            raise CorruptError("a reference to a layer's manifest has no sha256")
        return cls(**value)


@dataclass(frozen=True, slots=True)
class LayerSegment:
    """One segment of a layer's log: which part of which rows it holds, and its pieces."""

    ref: SegmentRef
    level: Level
    part: str
    seq: int
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, ref: SegmentRef, level: Level, seq: int, encoded: Encoded) -> LayerSegment:
        """The segment that holds `encoded`."""
        return cls(ref, level, encoded.part, seq, encoded.pieces)

    def to_json(self) -> dict[str, Any]:
        """What a manifest says of it beside its reference."""
        return {
            "level": self.level,
            "part": self.part,
            "seq": self.seq,
            "pieces": [piece.to_json() for piece in self.pieces],
        }

    @classmethod
    def from_json(cls, ref: SegmentRef, value: object) -> LayerSegment:
        """Read an entry that nobody vouches for; CorruptError unless every field is right."""
        if not isinstance(value, dict) or value.keys() != {"level", "part", "seq", "pieces"}:
            raise CorruptError(f"a manifest holds a malformed entry for segment {ref.name!r}")
        level, part, seq, pieces = (value[key] for key in ("level", "part", "seq", "pieces"))
        if level not in _LEVELS or type(part) is not str or type(seq) is not int:
            raise CorruptError(f"a manifest holds a malformed entry for segment {ref.name!r}")
        if not isinstance(pieces, list) or not pieces:
            raise CorruptError(f"a manifest names no pieces of segment {ref.name!r}")
        found = tuple(Piece.from_json(piece, ref.size) for piece in pieces)
        if sum(piece.rows for piece in found) != ref.rows:
            raise CorruptError(f"the pieces of segment {ref.name!r} have not its {ref.rows} rows")
        return cls(ref, level, part, seq, found)


def segment_name(level: Level, part: str, seq: int) -> str:
    """What a manifest calls the segment that commit `seq` added for a part."""
    return f"{seq}/{level}/{part}"


@dataclass(frozen=True, slots=True)
class ShardManifest:
    """One decoded manifest of a shard's log, every field of it checked."""

    layer_id: str
    shard: ShardId
    run_epoch: int
    incarnation: int
    seq: int
    kind: Literal["open", "shard"]
    step: int | None
    time: str
    schema: LayerSchema
    segments: tuple[LayerSegment, ...]
    parents: tuple[ManifestRef, ...]
    versions: Mapping[str, str | None]

    @property
    def layer_state(self) -> tuple[LayerSegment, ...]:
        """The segments that make up the shard's rows: a full snapshot, then its deltas."""
        return tuple(segment for segment in self.segments if segment.level != "seed")

    @property
    def seeds(self) -> tuple[LayerSegment, ...]:
        """The segments of the seed checkpoints of this commit."""
        return tuple(segment for segment in self.segments if segment.level == "seed")

    @property
    def timestamp(self) -> float:
        """When it was written, in seconds since 1970."""
        return datetime.fromisoformat(self.time).timestamp()


def body(entry: ShardManifest) -> dict[str, Any]:
    """The manifest as JSON values, without what `objects.header` adds."""
    return {
        "layer_id": entry.layer_id,
        "layer_key": layer_key(entry.layer_id),
        "shard": entry.shard.to_json(),
        "seq": entry.seq,
        "parent": [parent.to_json() for parent in entry.parents],
        "step": entry.step,
        "schema": entry.schema.to_json(),
        "versions": dict(entry.versions),
        "segments": [segment.ref.to_json() for segment in entry.segments],
        "index": {segment.ref.name: segment.to_json() for segment in entry.segments},
        "own": [segment.ref.name for segment in entry.segments if segment.seq == entry.seq],
    }


def read(root: Replica, path: str) -> tuple[ShardManifest, str]:
    """A stored manifest and its sha256; FileNotFoundError if absent, CorruptError if damaged."""
    data = root.read(path, manifest.MAX_BYTES)
    try:
        found = _from_json(manifest.decode(data))
    except CorruptError as error:
        raise type(error)(f"{root.url}/{path} is damaged: {error}", error.hint) from error
    key = layer_key(found.layer_id)
    if path != shard_path(key, found.run_epoch, found.shard.index, found.seq):
        raise CorruptError(f"{root.url}/{path} is the manifest of another place")
    return found, hashlib.sha256(data).hexdigest()


def _from_json(value: dict[str, Any]) -> ShardManifest:
    refs = {ref.name: ref for ref in manifest.segments(value)}
    index = value.get("index")
    if not isinstance(index, dict) or index.keys() != refs.keys():
        raise CorruptError("its index does not name its segments")
    segments = tuple(LayerSegment.from_json(ref, index[name]) for name, ref in refs.items())
    schema = LayerSchema.from_json(value.get("schema"))
    parts = schema.tables.keys() | schema.tensors.keys()
    if unknown := sorted({segment.part for segment in segments} - parts):
        raise CorruptError(f"its schema has no part {unknown[0]!r}")
    try:
        shard, writer = value["shard"], value["writer"]
        found = ShardManifest(
            value["layer_id"],
            ShardId(shard["index"], shard["count"], *shard["seed_range"]),
            value["run_epoch"],
            writer["incarnation"],
            value["seq"],
            value["kind"],
            value["step"],
            value["time"],
            schema,
            segments,
            tuple(ManifestRef.from_json(parent) for parent in value["parent"]),
            value["versions"],
        )
        _check_fields(found)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"it is no manifest of a layer's log: {error}") from error
    return found


def _check_fields(found: ShardManifest) -> None:
    counts = (
        found.run_epoch,
        found.incarnation,
        found.seq,
        *([] if found.step is None else [found.step]),
    )
    if any(type(n) is not int or not 0 <= n < 2**63 for n in counts):
        raise ValueError(f"its numbers are {counts!r}")
    if found.kind not in ("open", "shard") or type(found.layer_id) is not str:
        raise ValueError(f"its kind is {found.kind!r}")
    if not all(type(v) in (str, type(None)) for v in found.versions.values()):
        raise ValueError("its versions are no mapping")
    _ = found.timestamp


def list_shards(root: Root, key: str, run_epoch: int) -> list[int]:
    """Numbers of the shards that one run epoch has written of a layer, in order."""
    return _numbers(root, f"layers/{key}/e{run_epoch:08d}", SHARD_FOLDER)


def list_epochs(root: Root, key: str) -> list[int]:
    """Run epochs that have written a layer, in order."""
    return _numbers(root, f"layers/{key}", EPOCH_FOLDER)


def list_seqs(root: Root, key: str, run_epoch: int, shard: int) -> list[int]:
    """Numbers of a shard's manifests, in order."""
    return objects.numbers(root, shard_folder(key, run_epoch, shard), objects.COMMIT_NAME)


def _numbers(root: Root, folder: str, pattern: re.Pattern[str]) -> list[int]:
    matches = (pattern.fullmatch(name) for name in root.names(folder))
    return sorted(int(match[1]) for match in matches if match)
