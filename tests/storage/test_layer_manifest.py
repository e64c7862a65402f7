"""Manifests of a layer's log that are well formed, signed by their digest, and wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esper_ray.errors import CheckpointNotFound, CorruptError, FencedError, TooNewError
from esper_ray.storage import CheckpointManager, Root, ShardId, layer_manifest, manifest
from esper_ray.storage.group_commit import CommitPolicy
from esper_ray.storage.layer_manifest import ManifestRef
from esper_ray.storage.layer_rows import Rows
from tests.storage.layer_cases import LAYER, SCHEMA, blueprint, rows_of, same

SEEDS = 100
KEY = layer_manifest.layer_key(LAYER)
Body = dict[str, Any]


def put(*path: Any) -> Callable[[Body], None]:
    """Set the entry at a path of keys to the last argument."""
    *keys, last, value = path

    def change(body: Body) -> None:
        place: Any = body
        for key in keys:
            place = place[key]
        place[last] = value

    return change


def first_entry(name: str, value: object) -> Callable[[Body], None]:
    """Change one field of the index entry of the first segment."""

    def change(body: Body) -> None:
        body["index"][body["segments"][0]["name"]][name] = value

    return change


def stored(root: Path) -> Path:
    """A layer with a snapshot and a seed checkpoint; the path of its last manifest."""
    with CheckpointManager(
        str(root),
        layer_id=LAYER,
        schema=SCHEMA,
        shard=ShardId.whole(SEEDS),
        policy=CommitPolicy(interval_s=0.0),
    ) as manager:
        manager.save_layer(rows_of(range(SEEDS)), step=1)
        manager.save_checkpoint(LAYER, 1, {}, blueprint(1.0))
    return root / layer_manifest.shard_path(KEY, 1, 0, 3)


FORGERIES: dict[str, Callable[[Body], None]] = {
    "no index": lambda body: body.pop("index"),
    "index of other segments": lambda body: body["index"].popitem(),
    "an entry that is no mapping": lambda body: body["index"].update(
        {body["segments"][0]["name"]: 4}
    ),
    "unknown level": first_entry("level", "half"),
    "unknown part": first_entry("part", "optimizer"),
    "part that is no text": first_entry("part", ["state"]),
    "seq that is no number": first_entry("seq", "2"),
    "no pieces": first_entry("pieces", []),
    "pieces of other rows": first_entry("pieces", [[3, 0, 2, 0, 10, 7, []]]),
    "a piece outside": first_entry("pieces", [[SEEDS, 0, 99, 0, 10**9, 7, []]]),
    "a schema without state": put("schema", {"tables": {}, "tensors": {}}),
    "no shard": lambda body: body.pop("shard"),
    "a shard that cannot be": put("shard", "index", 5),
    "a shard of no seeds": put("shard", "seed_range", [7, 7]),
    "a shard that is a list": put("shard", []),
    "an incarnation that is text": put("writer", "incarnation", "1"),
    "no writer": lambda body: body.pop("writer"),
    "a kind of its own": put("kind", "run"),
    "a step before the first": put("step", -1),
    "a step that is a truth": put("step", True),
    "a time that is none": put("time", "yesterday"),
    "another layer": put("layer_id", "encoder.4"),
    "a layer that is no text": put("layer_id", ["encoder.3"]),
    "another number": put("seq", 4),
    "another epoch": put("run_epoch", 2),
    "parents that are no list": put("parent", 3),
    "a parent without a digest": put("parent", [{"run_epoch": 1, "shard": 0, "seq": 1}]),
    "a parent of no number": put(
        "parent", [{"run_epoch": 1, "shard": -1, "seq": 1, "sha256": "0" * 64}]
    ),
    "a parent of a short digest": put(
        "parent", [{"run_epoch": 1, "shard": 0, "seq": 1, "sha256": "0"}]
    ),
    "versions that are numbers": put("versions", {"torch": 2}),
    "versions that are a list": put("versions", ["2.13"]),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_manifest_is_refused_and_named(tmp_path: Path, name: str) -> None:
    path = stored(tmp_path)
    body = manifest.decode(path.read_bytes())
    FORGERIES[name](body)
    path.write_bytes(manifest.encode(body))
    with pytest.raises(CorruptError, match=path.name):
        layer_manifest.read(Root.open(str(tmp_path)), layer_manifest.shard_path(KEY, 1, 0, 3))
    reader = CheckpointManager(str(tmp_path), layer_id=LAYER)
    assert len(reader.restore_layer()) == SEEDS  # of the manifest before it


@pytest.mark.parametrize(
    ("part", "rows"), [("state", 2**40), ("weights", 2**40), ("weights", 2**62 // 64)]
)
def test_a_forged_number_of_rows_takes_no_memory(tmp_path: Path, part: str, rows: int) -> None:
    path = stored(tmp_path)
    body = manifest.decode(path.read_bytes())
    for ref in body["segments"]:
        entry = body["index"][ref["name"]]
        if entry["part"] == part:
            ref["rows"] = rows
            entry["pieces"] = [[rows, 0, 99, *entry["pieces"][0][3:]]]
    path.write_bytes(manifest.encode(body))
    reader = CheckpointManager(str(tmp_path), layer_id=LAYER).reader
    with pytest.raises(CorruptError):
        reader.rows(reader.cut())
    entry, _ = reader.manifest(1, 0, 3)
    with pytest.raises(CorruptError):
        reader.seed(entry, 1, 0)


def test_a_manifest_of_a_newer_version_is_not_passed_over(tmp_path: Path) -> None:
    path = stored(tmp_path)
    body = manifest.decode(path.read_bytes())
    path.write_bytes(manifest.encode({**body, "min_reader": 2}))
    with pytest.raises(TooNewError, match="newer version"):
        CheckpointManager(str(tmp_path), layer_id=LAYER).restore_layer()
    with pytest.raises(TooNewError, match="newer version"):
        stored(tmp_path)
    assert len(list(path.parent.iterdir())) == 3


def test_a_piece_that_no_memory_holds_is_refused(tmp_path: Path) -> None:
    path = stored(tmp_path)
    for span, words in (([0, 2**40], "ends before byte"), ([2**61, 8], "rows begin at byte")):
        body = manifest.decode(path.read_bytes())
        for ref in body["segments"]:
            ref["size"] = 2**62
            for piece in body["index"][ref["name"]]["pieces"]:
                piece[3:5] = span
        path.write_bytes(manifest.encode(body))
        manager = CheckpointManager(str(tmp_path), layer_id=LAYER)
        with pytest.raises(CorruptError, match=words):
            manager.restore_layer(seed_ids=np.array([1]))


@pytest.mark.parametrize("nearby", [False, True], ids=["from the root", "beside a replica"])
@pytest.mark.parametrize(
    ("kind", "part", "name", "at", "value", "words"),
    [
        ("tables", "state", "lifecycle", 1, "float32", "column 'lifecycle'"),
        ("tables", "state", "metrics", 1, "int32", "column 'metrics'"),
        ("tensors", "weights", "w", 1, "int32", "tensors of its schema"),
        ("tensors", "weights", "h", 1, "bfloat16", "tensors of its schema"),
        ("tensors", "weights", "w", 2, [3, 2], "tensors of its schema"),
    ],
)
def test_one_seed_of_a_schema_that_its_bytes_have_not_is_refused(
    tmp_path: Path, kind: str, part: str, name: str, at: int, value: Any, words: str, nearby: bool
) -> None:
    path = stored(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    replicas = [Root.open(str(tmp_path / "copy"))] if nearby else []
    saved = f"{KEY}-1-1-3-0"

    def reader() -> CheckpointManager:
        return CheckpointManager(str(tmp_path / "run"), layer_id=LAYER, replicas=replicas)

    reader().restore_checkpoint(saved, "cpu")
    body = manifest.decode(path.read_bytes())
    [told] = [one for one in body["schema"][kind][part] if one[0] == name]
    told[at] = value
    path.write_bytes(manifest.encode(body))
    with pytest.raises(CorruptError, match=words):
        reader().restore_checkpoint(saved, "cpu")
    with pytest.raises(CorruptError, match=words):
        reader().restore_layer(seed_ids=np.array([4]))


@pytest.mark.parametrize("suffix", ["arrow", "safetensors"])
def test_a_damaged_head_is_read_from_the_next_place(tmp_path: Path, suffix: str) -> None:
    stored(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "near")

    def restored() -> Rows:
        near = str(tmp_path / "near")
        reader = CheckpointManager(str(tmp_path / "run"), layer_id=LAYER, local_root=near)
        return reader.restore_layer(seed_ids=np.array([6]))

    whole = restored()
    for segment in (tmp_path / "near").rglob(f"*.{suffix}"):
        segment.write_bytes(bytes(40) + segment.read_bytes()[40:])
    assert same(restored(), whole)
    alone = CheckpointManager(str(tmp_path / "near"), layer_id=LAYER)
    with pytest.raises(CorruptError, match="is damaged"):
        alone.restore_layer(seed_ids=np.array([6]))


def test_rows_of_foreign_or_missing_seeds_are_refused(tmp_path: Path) -> None:
    path = stored(tmp_path)
    for seeds, words in ((SEEDS + 1, "lacks rows"), (SEEDS - 1, "foreign")):
        body = manifest.decode(path.read_bytes())
        body["shard"]["seed_range"] = [0, seeds]
        path.write_bytes(manifest.encode(body))
        reader = CheckpointManager(str(tmp_path), layer_id=LAYER).reader
        with pytest.raises(CorruptError, match=words):
            reader.rows(reader.cut())


def test_shards_of_other_columns_do_not_make_one_layer(tmp_path: Path) -> None:
    path = stored(tmp_path)
    body = manifest.decode(path.read_bytes())
    other = tmp_path / layer_manifest.shard_path(KEY, 1, 1, 3)
    other.parent.mkdir()
    for index, place in enumerate((path, other)):
        body["shard"] = {"index": index, "count": 2, "seed_range": [index * 50, index * 50 + 50]}
        if index:
            body["schema"]["tables"]["state"].append(["age", "int32", 0])
        place.write_bytes(manifest.encode(body))
    with pytest.raises(CorruptError, match="differ in their columns"):
        CheckpointManager(str(tmp_path), layer_id=LAYER).reader.cut()


def test_shards_divide_the_seeds_and_each_is_within_its_count() -> None:
    shards = ShardId.of(10, 3)
    assert [(shard.first, shard.stop) for shard in shards] == [(0, 3), (3, 6), (6, 10)]
    assert ShardId.of(10, 1) == [ShardId.whole(10)]
    for wrong in ((3, 3, 0, 1), (-1, 1, 0, 1), (0, 1, 5, 5), (0, 1, -1, 5), (0, 20_000, 0, 5)):
        with pytest.raises(ValueError, match="cannot"):
            ShardId(*wrong)


def test_a_pin_of_a_manifest_that_is_gone_is_not_found(tmp_path: Path) -> None:
    stored(tmp_path)
    reader = CheckpointManager(str(tmp_path), layer_id=LAYER)
    with pytest.raises(CheckpointNotFound, match="has no layers/"):
        reader.restore_layer(pins=[ManifestRef(1, 0, 9, "0" * 64)])


def test_a_damaged_newest_manifest_does_not_stop_the_next_writer(tmp_path: Path) -> None:
    path = stored(tmp_path)
    path.write_bytes(b"{}")
    with CheckpointManager(
        str(tmp_path), layer_id=LAYER, schema=SCHEMA, shard=ShardId.whole(SEEDS)
    ) as heir:
        assert heir.pin().seq == 4
        assert not heir.needs_all
    with pytest.raises(FencedError, match="incarnation 2"):
        CheckpointManager(
            str(tmp_path),
            layer_id=LAYER,
            schema=SCHEMA,
            shard=ShardId.whole(SEEDS),
            incarnation=2,
        )
