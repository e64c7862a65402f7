"""`verify` looks at everything: pins, collections, and the chains of layers' logs."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from esper_ray.storage import gc_log, manifest, objects, pins
from esper_ray.storage.collection import prune
from esper_ray.storage.commit_log import RunLog
from esper_ray.storage.filesystem import Root
from esper_ray.storage.retention import Retention
from esper_ray.storage.run_checkpoints import RunCheckpoints

KEY = "0a" * 8


def layer_path(seq: int, epoch: int = 1, shard: int = 0) -> str:
    return f"layers/{KEY}/e{epoch:08d}/s{shard:04d}/{seq:020d}.json"


def layer_body(log: RunLog, seq: int, parents: list[dict[str, Any]]) -> dict[str, Any]:
    ref = log.put_segment(f"{seq}/full/state", f"rows {seq}".encode(), "arrow")
    return {
        **objects.header("shard", 1),
        "layer_key": KEY,
        "shard": {"index": 0, "count": 1, "seed_range": [0, 4]},
        "seq": seq,
        "parent": parents,
        "segments": [ref.to_json()],
    }


@pytest.fixture
def log(root: Root) -> RunLog:
    """A run with every kind of object: commits, a pin, a layer's log, collected garbage."""
    log = RunLog(root)
    log.open_epoch(None)
    for seq in range(1, 5):
        ref = log.put_segment("state", f"state {seq}".encode(), "arrow")
        part = log.put_log(seq, f"events {seq}".encode(), rows=1)
        log.commit(seq, {"step": seq}, [ref], part)
    pins.pin(root, "good", 2)
    for _ in range(2):
        prune(root, Retention(last=1), 0, alone=True)
    parents: list[dict[str, Any]] = []
    for seq in range(3):
        data = manifest.encode(layer_body(log, seq, parents))
        root.create(layer_path(seq), data)
        digest = hashlib.sha256(data).hexdigest()
        parents = [{"run_epoch": 1, "shard": 0, "seq": seq, "sha256": digest}]
    return log


def everything(root: Root, folder: str = "") -> list[str]:
    """Every object below a root; names without a dot are folders here."""
    found = []
    for name in root.names(folder):
        path = f"{folder}/{name}" if folder else name
        found += [path] if "." in name else everything(root, path)
    return found


def damaged(log: RunLog) -> set[str]:
    return {p["object"] for p in RunCheckpoints(log).verify() if p["severity"] == "damage"}


def test_whole_run_has_no_problems(log: RunLog) -> None:
    assert RunCheckpoints(log).verify() == []
    assert RunCheckpoints(log).verify(quick=True) == []
    kinds = {path.split("/")[0] for path in everything(log.root)}
    assert kinds == {
        *("FORMAT.json", "commits", "epochs", "gc", "layers", "log", "pins", "segments"),
    }


def test_every_object_is_missed_but_the_newest_of_its_log(log: RunLog) -> None:
    newest = {
        objects.commit_path(4),  # a run that ended before it is whole too
        layer_path(2),
        gc_log.gc_path(max(gc_log.record_numbers(log.root))),
        "pins/good.json",
    }
    for path in everything(log.root):
        data = log.root.read(path, 10_000)
        log.root.remove(path)
        missed = {p["object"] for p in RunCheckpoints(log).verify()}
        assert missed or path in newest, path
        assert damaged(log) or path in newest, path
        log.root.create(path, data)
    assert damaged(log) == set()


def test_every_flipped_bit_is_found(log: RunLog) -> None:
    for number, path in enumerate(everything(log.root)):
        data = bytearray(log.root.read(path, 10_000))
        data[number * 7 % len(data)] ^= 1 << number % 8
        whole = log.root.read(path, 10_000)
        log.root.replace(path, bytes(data))
        assert path in damaged(log), path
        log.root.replace(path, whole)


@pytest.mark.parametrize(
    "change",
    [
        {"parent": None},
        {"parent": [{"seq": 1}]},
        {"parent": [{"run_epoch": "1", "shard": 0, "seq": 0, "sha256": "0"}]},
        {"parent": [{"run_epoch": 1, "shard": 0, "seq": 1, "sha256": "0" * 64}]},
        {"parent": [{"run_epoch": 7, "shard": 0, "seq": 1, "sha256": "0" * 64}]},
        {"layer_key": "0b" * 8},
        {"run_epoch": 2},
        {"seq": 3},
        {"shard": {"index": 1}},
        {"shard": None},
        {"segments": None},
    ],
)
def test_forged_manifest_of_a_layer_is_damage(log: RunLog, change: dict[str, object]) -> None:
    body = objects.read_manifest(log.root, layer_path(2))
    log.root.replace(layer_path(2), manifest.encode({**body, **change}))
    assert damaged(log)


def test_strange_names_are_noted(log: RunLog) -> None:
    strange = {
        *("layers/x.json", f"layers/{KEY}/notes.txt", f"layers/{KEY}/e00000001/a.b", "pins/A.json"),
        f"layers/{KEY}/e00000001/s0000/1.json",
    }
    for path in strange:
        log.root.create(path, b"mine")
    assert {p["object"] for p in RunCheckpoints(log).verify()} == strange
    assert damaged(log) == set()
