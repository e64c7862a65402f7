"""Log parts: created before the commit that names them, found again along one history."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_ray.errors import CheckpointNotFound, CorruptError, FencedError, StorageUnavailable
from esper_ray.storage import manifest, objects
from esper_ray.storage.commit_log import RunLog
from esper_ray.storage.filesystem import Root
from esper_ray.storage.manifest import LogRef
from esper_ray.storage.objects import commit_path
from esper_ray.storage.run_checkpoints import RunCheckpoints


def add(log: RunLog, seq: int, events: str | None = "events") -> LogRef | None:
    part = None if events is None else log.put_log(seq, f"{events} {seq}".encode(), rows=seq)
    log.commit(seq, {"step": seq}, [], part)
    return part


def started(root: Root, commits: int) -> RunLog:
    log = RunLog(root)
    log.open_epoch(None)
    for seq in range(1, commits + 1):
        add(log, seq)
    return log


def findings(log: RunLog) -> dict[str, str]:
    return {found["object"]: found["severity"] for found in RunCheckpoints(log).verify()}


# ------------------------------------------------------------------ writing


def test_part_is_stored_under_its_start_and_commit(root: Root) -> None:
    log = started(root, 1)
    log.open_epoch(1)
    part = add(log, 2)
    assert part is not None
    assert part.path == "log/00000002-00000000000000000002.arrow"
    assert (part.size, part.rows) == (8, 2)
    assert log.read_log(part) == root.read(part.path, 8) == b"events 2"
    assert manifest.log_part(log.read_commit(2)) == part
    assert findings(log) == {}


def test_commit_without_events_names_no_part(root: Root) -> None:
    log = started(root, 0)
    add(log, 1, None)
    assert "log" not in log.read_commit(1)
    assert log.log_parts() == []
    assert root.names("log") == []


def test_part_stored_twice_is_one(root: Root) -> None:
    log = started(root, 0)
    assert log.put_log(1, b"data", 3) == log.put_log(1, b"data", 3)
    assert len(root.names("log")) == 1


@pytest.mark.parametrize("other", [b"dada", b"", b"longer data"])
def test_part_that_another_writer_stored_is_fenced(root: Root, other: bytes) -> None:
    log = started(root, 0)
    log.put_log(1, b"data", 3)
    with pytest.raises(FencedError, match="another writer"):
        log.put_log(1, other, 3)
    assert root.read("log/00000001-00000000000000000001.arrow", 4) == b"data"


def test_writer_of_an_older_start_cannot_log(root: Root) -> None:
    zombie = started(root, 0)
    RunLog(root).open_epoch(None)
    with pytest.raises(FencedError, match="started again"):
        zombie.put_log(1, b"data", 0)
    assert root.names("log") == []


def test_part_larger_than_a_manifest_is_confirmed(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = started(root, 0)
    monkeypatch.setattr(manifest, "MAX_BYTES", 100)
    assert log.put_log(1, b"x" * 200, 0) == log.put_log(1, b"x" * 200, 0)


class LosingRoot(Root):
    """A root whose replies to creates are lost."""

    lose = False

    def create(self, path: str, data: bytes) -> None:
        super().create(path, data)
        if self.lose:
            raise StorageUnavailable("the reply was lost")


def test_lost_reply_is_confirmed_by_reading(tmp_path: Path) -> None:
    root = LosingRoot.open(str(tmp_path))
    assert isinstance(root, LosingRoot)
    log = started(root, 0)
    root.lose = True
    part = add(log, 1)
    assert log.log_parts() == [(1, part)]


def test_misused_log_says_so(root: Root) -> None:
    log = RunLog(root)
    with pytest.raises(RuntimeError, match="open_epoch"):
        log.put_log(1, b"", 0)
    log = started(root, 1)
    log.open_epoch(1)
    with pytest.raises(ValueError, match="not this epoch's"):
        log.put_log(1, b"", 0)
    part = log.put_log(3, b"data", 0)
    with pytest.raises(ValueError, match="not the event log of commit 2"):
        log.commit(2, {}, [], part)
    with pytest.raises(ValueError, match=r"\['log'\]"):
        log.commit(2, {"log": part.to_json()}, [])


# ------------------------------------------------------------------ history


def test_parts_follow_the_current_history_oldest_first(root: Root) -> None:
    log = started(root, 4)
    log.open_epoch(2)
    add(log, 5)
    add(log, 6, None)
    add(log, 7)
    assert [seq for seq, _ in log.log_parts()] == [1, 2, 5, 7]
    assert [log.read_log(part) for _, part in log.log_parts()][2:] == [b"events 5", b"events 7"]
    assert [seq for seq, _ in log.log_parts(upto=6)] == [1, 2, 5]
    assert [seq for seq, _ in log.log_parts(upto=2)] == [1, 2]
    assert [seq for seq, _ in log.log_parts(upto=3)] == [1, 2, 3]  # given up, but a pin may name it
    for seq in (0, 8):
        with pytest.raises(CheckpointNotFound, match=f"no commit {seq}"):
            log.log_parts(upto=seq)


def test_log_of_an_empty_place_is_empty(root: Root) -> None:
    assert RunLog(root).log_parts() == []


@settings(max_examples=25, deadline=None)
@given(
    starts=st.lists(
        st.tuples(st.none() | st.integers(0, 9), st.lists(st.booleans(), max_size=3)),
        min_size=1,
        max_size=5,
    )
)
def test_parts_are_those_of_the_lineage(starts: list[tuple[int | None, list[bool]]]) -> None:
    log = RunLog(Root.open(f"memory://{uuid.uuid4().hex}"))
    with_events: dict[int, LogRef | None] = {}
    for pick, commits in starts:
        history = log.lineage()
        resumed = None if pick is None or not history else history[pick % len(history)]
        seq = log.open_epoch(resumed).next_seq
        for eventful in commits:
            with_events[seq] = add(log, seq, "events" if eventful else None)
            seq += 1
    history = log.lineage()[::-1]
    for upto in [*history, None]:
        wanted = [seq for seq in history if upto is None or seq <= upto]
        assert log.log_parts(upto) == [(s, with_events[s]) for s in wanted if with_events[s]]


# ------------------------------------------------------------------ crashes and damage

KILLED_BETWEEN = """
import os, signal, sys
from esper_ray.storage import Root, RunLog
log = RunLog(Root.open(sys.argv[1]))
seq = log.open_epoch(log.lineage()[0]).next_seq
log.put_log(seq, b"never committed", 1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_part_of_a_writer_killed_before_its_commit_is_an_orphan(tmp_path: Path) -> None:
    root = Root.open(str(tmp_path))
    started(root, 2)
    done = subprocess.run(
        [sys.executable, "-c", KILLED_BETWEEN, str(tmp_path)], timeout=60, check=False
    )
    assert done.returncode == -9
    log = RunLog(root)
    assert log.open_epoch(2).next_seq == 3
    add(log, 3)
    assert [seq for seq, _ in log.log_parts()] == [1, 2, 3]
    assert findings(log) == {"log/00000002-00000000000000000003.arrow": "note"}


def spoil(root: Root, path: str, data: bytes | None) -> None:
    if data is None:
        root.remove(path)
    else:
        root.replace(path, data)


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        (None, "missing"),
        (b"event", "5 bytes, not 8"),
        (b"events 22", "9 bytes"),
        (b"Events 2", "256"),
    ],
)
def test_damaged_part_is_damage_like_a_segment(
    root: Root, stored: bytes | None, reason: str
) -> None:
    log, lines = started(root, 2), list[str]()
    (_, whole), (_, part) = log.log_parts()
    spoil(root, part.path, stored)
    manager = RunCheckpoints(log)
    with pytest.raises(CorruptError, match=reason):
        log.read_log(part)
    with pytest.raises(CorruptError, match=part.file):
        manager.load(2)
    assert manager.load(2, verify=False)["seq"] == 2
    found = manager.newest_valid(lines.append)
    assert found is not None
    assert found[0] == 1
    assert part.file in lines[0]
    assert [row["status"][:7] for row in manager.rows()] == ["damaged", "ok"]
    assert [row["bytes"] for row in manager.rows()] == [8, whole.size]
    assert findings(log) == {part.path: "damage"}


def test_part_replaced_by_a_link_is_damage(tmp_path: Path) -> None:
    log = started(Root.open(str(tmp_path / "run")), 1)
    path = tmp_path / "run" / log.log_parts()[0][1].path
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    with pytest.raises(CorruptError, match="regular"):
        RunCheckpoints(log).load(1)
    assert list(findings(log).values()) == ["damage"]


def test_damaged_commit_in_the_history_is_an_error(root: Root) -> None:
    log = started(root, 3)
    root.replace(commit_path(2), b"{}")
    with pytest.raises(CorruptError, match="commits/"):
        log.log_parts()
    assert [seq for seq, _ in log.log_parts(upto=1)] == [1]


def test_strangers_in_the_log_folder_are_noted(root: Root) -> None:
    log = started(root, 1)
    root.create("log/notes.txt", b"x")
    root.create("log/a.arrow.77.tmp", b"x")
    assert findings(log) == {"log/notes.txt": "note", "log/a.arrow.77.tmp": "note"}


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../commits/x"},
        {"file": manifest.log_file(1, 1)},
        {"file": manifest.log_file(2, 2)},
        {"sha256": "x"},
        {"size": -1},
        {"more": 1},
    ],
)
def test_forged_log_reference_in_a_commit_is_damage(root: Root, change: dict[str, Any]) -> None:
    log = started(root, 1)
    ref = {"file": manifest.log_file(1, 2), "sha256": "0" * 64, "size": 1, "rows": 0, **change}
    body = {**objects.header("run", 1), "seq": 2, "segments": [], "log": ref}
    root.create(commit_path(2), manifest.encode(body))
    with pytest.raises(CorruptError, match="commits/"):
        log.read_commit(2)
    assert findings(log) == {commit_path(2): "damage"}
