"""Selectors, fall-back and verification, on a small run that is damaged in every way."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esper_ray.errors import CheckpointNotFound, CorruptError
from esper_ray.storage import manifest, objects
from esper_ray.storage.commit_log import RunLog
from esper_ray.storage.filesystem import Root
from esper_ray.storage.objects import commit_path, epoch_path
from esper_ray.storage.run_checkpoints import RunCheckpoints, split_url


def never(message: str) -> None:
    raise AssertionError(message)


def damage(manager: RunCheckpoints) -> list[str]:
    return [found["object"] for found in manager.verify() if found["severity"] == "damage"]


def notes(manager: RunCheckpoints) -> dict[str, str]:
    return {
        found["object"]: found["problem"]
        for found in manager.verify()
        if found["severity"] == "note"
    }


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x41
    path.write_bytes(data)


def add_commit(log: RunLog, seq: int, step: int) -> None:
    ref = log.put_segment("a", f"step {step}".encode(), "arrow")
    log.commit(seq, {"step": step, "epoch": 0}, [ref])


# ------------------------------------------------------------------ selectors


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("runs/a", ("runs/a", "latest")),
        ("runs/a@latest", ("runs/a", "latest")),
        ("runs/a@step=12", ("runs/a", "step=12")),
        ("runs/a@before-growth", ("runs/a", "before-growth")),
        ("s3://b/p@step=3", ("s3://b/p", "step=3")),
        ("s3://user@bucket/p", ("s3://user@bucket/p", "latest")),
        ("s3://user@bucket/p@latest", ("s3://user@bucket/p", "latest")),
        ("s3://user@bucket", ("s3://user@bucket", "latest")),
        ("memory://x@latest", ("memory://x", "latest")),
        ("memory://x@step=4", ("memory://x", "step=4")),
        ("runs/a@Step=1", ("runs/a@Step=1", "latest")),
        ("runs/a@step=", ("runs/a@step=", "latest")),
        ("runs/me@home/a", ("runs/me@home/a", "latest")),
        ("", ("", "latest")),
    ],
)
def test_selector_is_split_from_the_end_of_a_url(url: str, expected: tuple[str, str]) -> None:
    assert split_url(url) == expected


def test_selectors_follow_the_current_history(root: Root) -> None:
    log = RunLog(root)
    manager = RunCheckpoints(log)
    log.open_epoch(None)
    for seq in range(1, 5):
        add_commit(log, seq, step=10 * seq)
    log.open_epoch(2)
    assert manager.resolve("latest") == 2
    add_commit(log, 5, step=30)
    assert manager.resolve("latest") == 5
    assert manager.resolve("step=30") == 5
    assert manager.resolve("step=20") == 2
    with pytest.raises(CheckpointNotFound, match=r"step=30, step=20, step=10$"):
        manager.resolve("step=40")
    with pytest.raises(CheckpointNotFound, match="no checkpoint 'my-pin'"):
        manager.resolve("my-pin")
    log.open_epoch(None)
    with pytest.raises(CheckpointNotFound, match="no checkpoint is stored"):
        manager.resolve("latest")


def test_empty_place_has_no_checkpoint(root: Root) -> None:
    manager = RunCheckpoints(RunLog(root))
    with pytest.raises(CheckpointNotFound, match=root.url):
        manager.resolve("latest")
    assert manager.newest_valid(never) is None
    assert manager.rows() == []
    assert manager.verify() == []


def test_run_that_never_committed_has_no_checkpoint(root: Root) -> None:
    RunLog(root).open_epoch(None)
    assert RunCheckpoints(RunLog(root)).newest_valid(never) is None


def test_long_list_of_steps_is_cut_and_unreadable_ones_are_counted(root: Root) -> None:
    log = RunLog(root)
    log.open_epoch(None)
    for seq in range(1, 11):
        log.commit(seq, {"step": seq}, [])
    root.create(commit_path(11), b"damaged")
    with pytest.raises(CorruptError, match=r"step=3, \.\.\.; 1 more cannot be read"):
        RunCheckpoints(log).resolve("step=99")


# ------------------------------------------------------------------ whole and damaged


def test_whole_run_loads_lists_and_verifies(local_log: RunLog) -> None:
    manager = RunCheckpoints(local_log)
    found = manager.newest_valid(never)
    assert found is not None
    assert (found[0], found[1]["step"]) == (2, 20)
    assert manager.load(1) == manager.load(1, verify=False)
    rows = manager.rows()
    assert [(row["seq"], row["step"], row["epoch"], row["status"]) for row in rows] == [
        (2, 20, 2, "ok"),
        (1, 10, 1, "ok"),
    ]
    assert all(row["segments"] == 2 and row["bytes"] > 0 and row["time"] for row in rows)
    assert manager.verify() == []


def test_damaged_newest_is_named_and_passed_over(local_log: RunLog, local_folder: Path) -> None:
    ref = manifest.segments(local_log.read_commit(2))[1]
    flip(local_folder / ref.path, 30)
    manager, lines = RunCheckpoints(local_log), list[str]()
    found = manager.newest_valid(lines.append)
    assert found is not None
    assert found[0] == 1
    assert len(lines) == 1
    assert "checkpoint 2 is damaged" in lines[0]
    assert ref.sha256 in lines[0]
    assert "\n" not in lines[0]
    assert [row["status"][:7] for row in manager.rows()] == ["damaged", "ok"]
    assert manager.load(2, verify=False)["step"] == 20
    assert damage(manager) == [ref.path]


def test_run_with_every_commit_damaged_is_an_error(local_log: RunLog, local_folder: Path) -> None:
    shared = manifest.segments(local_log.read_commit(2))[0]
    (local_folder / shared.path).unlink()
    manager, lines = RunCheckpoints(local_log), list[str]()
    with pytest.raises(CorruptError, match="all 2 checkpoints"):
        manager.newest_valid(lines.append)
    assert len(lines) == 2
    assert damage(manager) == [shared.path]


def remove_format(folder: Path) -> None:
    (folder / "FORMAT.json").unlink()


def damage_format(folder: Path) -> None:
    flip(folder / "FORMAT.json", 5)


def damage_epoch(folder: Path) -> None:
    flip(folder / epoch_path(1), 5)


def remove_epochs(folder: Path) -> None:
    shutil.rmtree(folder / "epochs")


@pytest.mark.parametrize("harm", [remove_format, damage_format, damage_epoch, remove_epochs])
def test_damaged_run_record_is_an_error_not_an_empty_run(
    local_log: RunLog, local_folder: Path, harm: Callable[[Path], None]
) -> None:
    harm(local_folder)
    manager = RunCheckpoints(local_log)
    with pytest.raises(CorruptError):
        manager.newest_valid(never)
    with pytest.raises(CorruptError):
        manager.rows()
    assert damage(manager)


def test_every_flipped_byte_of_every_object_is_found(local_log: RunLog, local_folder: Path) -> None:
    manager = RunCheckpoints(local_log)
    files = sorted(path for path in local_folder.rglob("*") if path.is_file())
    assert len(files) == 1 + 1 + 2 + 3 + 2
    for path in files:
        name, whole = str(path.relative_to(local_folder)), path.read_bytes()
        for at in [*range(0, len(whole), max(1, len(whole) // 8)), len(whole) - 1]:
            flip(path, at)
            assert name in damage(manager), (name, at)
            if name.startswith(("segments", "commits", "log")):
                check_refused(manager, name)
            path.write_bytes(whole)
    assert manager.verify() == []


def check_refused(manager: RunCheckpoints, name: str) -> None:
    refused = 0
    for seq in (1, 2):
        try:
            body = manager.load(seq)
        except CorruptError:
            refused += 1
        else:
            assert name not in {ref.path for ref in manifest.references(body)}
            assert name != commit_path(seq)
    assert refused >= 1


@pytest.mark.parametrize("keep", [0, 1, 0.5, -1])
def test_truncated_commit_is_found(local_log: RunLog, local_folder: Path, keep: float) -> None:
    path = local_folder / commit_path(2)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if keep == 0.5 else int(keep)])
    manager, lines = RunCheckpoints(local_log), list[str]()
    found = manager.newest_valid(lines.append)
    assert found is not None
    assert found[0] == 1
    assert len(lines) == 1
    # What only the damaged manifest names is unreferenced now, which is no damage of its own.
    assert damage(manager) == [commit_path(2)]
    assert list(notes(manager).values()) == ["orphan", "orphan"]


def test_damage_of_superseded_commits_is_found(local_log: RunLog, local_folder: Path) -> None:
    local_log.open_epoch(None)
    flip(local_folder / commit_path(1), 9)
    assert damage(RunCheckpoints(local_log)) == [commit_path(1)]


def test_missing_epoch_record_is_found(local_log: RunLog, local_folder: Path) -> None:
    local_log.open_epoch(2)
    local_log.open_epoch(2)
    add_commit(local_log, 3, step=30)
    (local_folder / epoch_path(2)).unlink()
    manager = RunCheckpoints(local_log)
    assert damage(manager) == [epoch_path(2)]
    (local_folder / epoch_path(3)).unlink()
    assert damage(manager) == [commit_path(3)]


def test_leftovers_orphans_and_strangers_are_notes(root: Root) -> None:
    log = RunLog(root)
    log.open_epoch(None)
    orphan = log.put_segment("a", b"unused", "arrow")
    root.create("commits/0.json.77.tmp", b"x")
    root.create("commits/readme.txt", b"x")
    root.create("segments/sha256/zz/x", b"x")
    root.create("log/1.arrow", b"x")
    assert notes(RunCheckpoints(log)) == {
        orphan.path: "orphan",
        "commits/0.json.77.tmp": "a temporary file of an interrupted writer",
        "commits/readme.txt": "not an object of this format",
        "log/1.arrow": "not an object of this format",
        "segments/sha256/zz": "not an object of this format",
    }
    assert damage(RunCheckpoints(log)) == []


def test_orphan_with_other_content_or_folder_is_damage(root: Root) -> None:
    log = RunLog(root)
    log.open_epoch(None)
    right = RunLog(Root.open("memory://elsewhere3")).put_segment("a", b"unused", "arrow")
    moved = f"segments/sha256/00/{right.sha256}.arrow"
    root.create(right.path, b"changed")
    root.create(moved, b"unused")
    assert sorted(damage(RunCheckpoints(log))) == sorted([right.path, moved])


def test_segment_replaced_by_a_link_is_damage(
    local_log: RunLog, local_folder: Path, tmp_path: Path
) -> None:
    path = local_folder / manifest.segments(local_log.read_commit(2))[1].path
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    manager = RunCheckpoints(local_log)
    with pytest.raises(CorruptError, match="regular"):
        manager.load(2)
    assert damage(manager) == [str(path.relative_to(local_folder))]


def forged_commit(refs: list[dict[str, Any]]) -> bytes:
    return manifest.encode({**objects.header("run", 1), "seq": 3, "step": 30, "segments": refs})


def test_commit_that_lies_about_a_size_is_damage(local_log: RunLog) -> None:
    ref = manifest.segments(local_log.read_commit(2))[1]
    lie = {**ref.to_json(), "size": ref.size + 1}
    local_log.root.create(commit_path(3), forged_commit([lie]))
    manager = RunCheckpoints(local_log)
    assert damage(manager) == [commit_path(3)]
    with pytest.raises(CorruptError, match="bytes, not"):
        manager.load(3)


def test_lone_commit_that_lies_about_a_size_is_damage(root: Root) -> None:
    log = RunLog(root)
    log.open_epoch(None)
    ref = log.put_segment("a", b"data", "arrow")
    root.create(commit_path(3), forged_commit([{**ref.to_json(), "size": 9}]))
    assert damage(RunCheckpoints(log)) == [ref.path]


def test_path_out_of_the_root_in_a_manifest_is_refused(local_log: RunLog, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"1")
    ref = manifest.segments(local_log.read_commit(2))[0].to_json()
    local_log.root.create(commit_path(3), forged_commit([{**ref, "file": "../../secret"}]))
    manager = RunCheckpoints(local_log)
    with pytest.raises(CorruptError, match="refused segment"):
        manager.load(3)
    assert damage(manager) == [commit_path(3)]
