"""Pins: created once, found by name, and known to `verify`."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper_ray.errors import CheckpointNotFound, ConfigError, CorruptError
from esper_ray.storage import manifest, objects, pins
from esper_ray.storage.commit_log import RunLog
from esper_ray.storage.filesystem import Root
from esper_ray.storage.run_checkpoints import RunCheckpoints


def pinned(root: Root) -> RunCheckpoints:
    log = RunLog(root)
    log.open_epoch(None)
    log.commit(1, {"step": 10}, [])
    log.commit(2, {"step": 20}, [])
    pins.pin(root, "good", 1)
    return RunCheckpoints(log)


def test_pin_finds_its_commit(root: Root) -> None:
    run = pinned(root)
    assert (run.resolve("good"), run.resolve("latest")) == (1, 2)
    assert pins.pins(root)[0].step == 10
    assert run.verify() == []


def test_pin_finds_a_commit_that_the_history_gave_up(root: Root) -> None:
    run = pinned(root)
    RunLog(root).open_epoch(None)
    assert run.resolve("good") == 1
    log = RunLog(root)
    assert (log.lineage(), log.lineage(2), log.lineage(1)) == ([], [2, 1], [1])
    log.open_epoch(1)
    log.commit(3, {"step": 11}, [])
    assert log.lineage() == [3, 1]


def test_pin_is_created_once(root: Root) -> None:
    pinned(root)
    assert pins.pin(root, "good", 1).seq == 1  # the same again is no change
    with pytest.raises(ConfigError, match="has a pin 'good' already, of step 10"):
        pins.pin(root, "good", 2)
    pins.unpin(root, "good")
    assert pins.pin(root, "good", 2).step == 20


def test_absent_pins_and_commits_are_named(root: Root) -> None:
    run = pinned(root)
    with pytest.raises(CheckpointNotFound, match=r"no pin 'bad' at .*: it has good"):
        run.resolve("bad")
    with pytest.raises(CheckpointNotFound, match="no pin 'bad'"):
        pins.unpin(root, "bad")
    with pytest.raises(CheckpointNotFound, match="no commit 9"):
        pins.pin(root, "nine", 9)


@pytest.mark.parametrize("name", ["", "latest", "Good", "a/b", "..", "step=3", "x" * 65, "a\n"])
def test_names_that_no_selector_can_say_are_refused(root: Root, name: str) -> None:
    pinned(root)
    with pytest.raises(ConfigError, match="cannot be the name of a pin"):
        pins.pin(root, name, 1)
    with pytest.raises(ConfigError, match="cannot be the name of a pin"):
        pins.unpin(root, name)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "run"},
        {"name": "other"},
        {"seq": "1"},
        {"step": -1},
        {"seq": 2},
        {"seq": 7},
        {"sha256": "0" * 64},
        {"sha256": "../" * 20},
        {"name": None},
    ],
)
def test_forged_pin_is_damage(root: Root, change: dict[str, object]) -> None:
    run = pinned(root)
    body = {**objects.read_manifest(root, "pins/good.json"), **change}
    root.replace("pins/good.json", manifest.encode(body))
    with pytest.raises(CorruptError):
        run.resolve("good")
    assert [p["object"] for p in run.verify() if p["severity"] == "damage"] == ["pins/good.json"]


def test_verify_of_one_commit_looks_at_what_it_needs_only(
    local_log: RunLog, local_folder: Path
) -> None:
    state = manifest.segments(local_log.read_commit(1))[1]
    (local_folder / state.path).write_bytes(b"damaged")
    run = RunCheckpoints(local_log)
    assert run.verify(2) == []
    assert [p["object"] for p in run.verify(1)] == [state.path]
    assert [p["object"] for p in run.verify(1, quick=True)] == [state.path]
    (local_folder / objects.epoch_path(1)).unlink()
    assert [p["object"] for p in run.verify(2)] == [objects.epoch_path(1)]


def test_quick_verify_sees_sizes_and_absence_but_not_content(
    local_log: RunLog, local_folder: Path
) -> None:
    run = RunCheckpoints(local_log)
    assert run.verify(quick=True) == []
    body = local_log.read_commit(2)
    file = local_folder / manifest.segments(body)[0].path
    data = file.read_bytes()
    file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    part = manifest.log_part(body)
    assert part is not None
    assert run.verify(quick=True) == []
    (local_folder / part.path).unlink()
    assert [p["object"] for p in run.verify(quick=True)] == [part.path]
    assert len(run.verify()) == 2
