"""Commits: one winner per number, nothing half written, one history after every restart."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_ray.errors import CheckpointNotFound, CorruptError, FencedError, StorageUnavailable
from esper_ray.storage import commit_log, manifest, objects
from esper_ray.storage.commit_log import EpochRecord, RunLog, lineage
from esper_ray.storage.filesystem import Root
from esper_ray.storage.objects import commit_path, epoch_path
from esper_ray.storage.run_checkpoints import RunCheckpoints


class UnreliableRoot(Root):
    """A root whose creates fail, before or after the object was stored."""

    fail: str | None = None

    def create(self, path: str, data: bytes) -> None:
        if self.fail == "before":
            raise StorageUnavailable("no answer")
        super().create(path, data)
        if self.fail == "after":
            raise StorageUnavailable("the reply was lost")


# ------------------------------------------------------------------ lineage

Starts = list[tuple[int | None, int]]


def simulate(starts: Starts) -> tuple[list[EpochRecord], list[int], list[int]]:
    """Play starts as (index into the visible history or None, commits); follow parent pointers."""
    parent: dict[int, int | None] = {}
    epochs: list[EpochRecord] = []
    head: int | None = None
    for number, (pick, commits) in enumerate(starts, 1):
        visible = chain(parent, head)
        head = None if pick is None or not visible else visible[pick % len(visible)]
        epochs.append(EpochRecord(number, head, len(parent) + 1))
        for _ in range(commits):
            seq = len(parent) + 1
            parent[seq], head = head, seq
    return epochs, list(parent), chain(parent, head)


def chain(parent: dict[int, int | None], head: int | None) -> list[int]:
    seqs = []
    while head is not None:
        seqs.append(head)
        head = parent[head]
    return seqs


@settings(deadline=None)
@given(
    starts=st.lists(
        st.tuples(st.none() | st.integers(0, 30), st.integers(0, 4)), min_size=1, max_size=8
    ),
    order=st.randoms(use_true_random=False),
)
def test_lineage_follows_the_parents_of_the_newest_commit(starts: Starts, order: Any) -> None:
    epochs, seqs, expected = simulate(starts)
    shuffled = list(epochs)
    order.shuffle(shuffled)
    order.shuffle(seqs)
    assert lineage(shuffled, seqs) == expected


@settings(deadline=None)
@given(
    starts=st.lists(
        st.tuples(st.none() | st.integers(0, 30), st.integers(0, 4)), min_size=1, max_size=8
    )
)
def test_lineage_hides_what_every_later_start_gave_up(starts: Starts) -> None:
    epochs, seqs, _ = simulate(starts)
    hidden = {
        seq for epoch in epochs for seq in seqs if (epoch.resumed_from or 0) < seq < epoch.next_seq
    }
    assert lineage(epochs, seqs) == sorted(set(seqs) - hidden, reverse=True)


def test_lineage_without_a_start_is_empty() -> None:
    assert lineage([], [1, 2]) == []


def test_lineage_skips_a_commit_that_is_gone() -> None:
    assert lineage([EpochRecord(1, None, 1)], [1, 3]) == [3, 1]


# ------------------------------------------------------------------ epochs


def test_starts_are_numbered_and_survive_reopening(root: Root) -> None:
    log = RunLog(root)
    assert log.open_epoch(None) == EpochRecord(1, None, 1)
    log.commit(1, {"step": 5}, [])
    assert RunLog(root).open_epoch(1) == EpochRecord(2, 1, 2)
    assert RunLog(root).open_epoch(None, "s3://other/run@latest").source == "s3://other/run@latest"
    again = pickle.loads(pickle.dumps(RunLog(root)))
    assert [epoch.resumed_from for epoch in again.epochs()] == [None, 1, None]
    assert again.lineage() == []


def test_next_number_counts_damaged_commits(root: Root) -> None:
    RunLog(root).open_epoch(None)
    root.create(commit_path(7), b"damaged")
    assert RunLog(root).open_epoch(None).next_seq == 8


@pytest.mark.parametrize("name", ["commits/99999999999999999999", "epochs/99999999"])
def test_a_number_that_leaves_none_for_those_who_follow_is_refused(root: Root, name: str) -> None:
    log = RunLog(root)
    record = log.open_epoch(None)
    log.commit(record.next_seq, {"step": 1}, [])
    root.create(f"{name}.json", b"{}")
    with pytest.raises(CorruptError, match="9999, more than any run stores"):
        RunLog(root).open_epoch(1)  # what came after it would have a name that no reader knows
    root.create("gc/99999999999999999999.json", b"{}")
    tracemalloc.start()
    found = {problem["object"] for problem in RunCheckpoints(log).verify()}
    assert tracemalloc.get_traced_memory()[1] < 2**22  # nor are all that are missing counted
    tracemalloc.stop()
    assert {"gc/99999999999999999999.json", f"{name}.json"} <= found


def test_resuming_an_absent_commit_is_refused(root: Root) -> None:
    with pytest.raises(CheckpointNotFound, match="no commit 3"):
        RunLog(root).open_epoch(3)


def test_epoch_number_taken_meanwhile_is_passed_over(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, seen = RunLog(root), list[int]()

    def stale() -> list[int]:
        seen.append(1)
        return [] if len(seen) == 1 else objects.numbers(root, "epochs", objects.EPOCH_NAME)

    RunLog(root).open_epoch(None)
    monkeypatch.setattr(log, "epoch_numbers", stale)
    assert log.open_epoch(None).run_epoch == 2


def test_endless_conflict_is_given_up(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(root)
    RunLog(root).open_epoch(None)
    monkeypatch.setattr(commit_log, "_EPOCH_ATTEMPTS", 3)
    monkeypatch.setattr(log, "epoch_numbers", list)
    with pytest.raises(StorageUnavailable, match="too many writers"):
        log.open_epoch(None)


@pytest.mark.parametrize(
    "data",
    [
        b"{}",
        manifest.encode({"format": "esper-ckpt", "version": 2}),
        manifest.encode({"format": "esper-ckpt"}),
        manifest.encode({"format": "other", "version": 1}),
    ],
)
def test_place_of_another_format_is_refused(root: Root, data: bytes) -> None:
    root.create("FORMAT.json", data)
    with pytest.raises(CorruptError, match=r"FORMAT\.json"):
        RunLog(root).open_epoch(None)
    assert root.names("epochs") == []


def epoch_bytes(**change: object) -> bytes:
    record = {"resumed_from": None, "next_seq": 1, "source": None}
    return manifest.encode({**objects.header("epoch", 1), **record, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "run"},
        {"run_epoch": 2},
        {"run_epoch": "1"},
        {"next_seq": None},
        {"resumed_from": True},
        {"resumed_from": 1},
        {"source": 5},
    ],
)
def test_forged_epoch_record_is_refused(root: Root, change: dict[str, object]) -> None:
    root.create(epoch_path(1), epoch_bytes(**change))
    with pytest.raises(CorruptError):
        RunLog(root).lineage()


def test_missing_epoch_record_is_damage(root: Root) -> None:
    root.create(epoch_path(2), epoch_bytes(run_epoch=2))
    with pytest.raises(CorruptError, match="gap"):
        RunLog(root).lineage()


# ------------------------------------------------------------------ segments


def test_segment_is_stored_once_under_its_content(root: Root) -> None:
    log = RunLog(root)
    first = log.put_segment("a", b"data", "arrow", rows=2)
    second = log.put_segment("b", b"data", ".arrow", rows=2)
    assert first.file == second.file
    assert (first.size, first.rows, second.name) == (4, 2, "b")
    assert log.read_segment(first) == b"data"


def test_unknown_suffix_is_refused(root: Root) -> None:
    with pytest.raises(ValueError, match="segment file"):
        RunLog(root).put_segment("a", b"data", "pt")


@pytest.mark.parametrize("stored", [b"dat", b"dada", b"dat!!"])
def test_damaged_segment_is_replaced_when_its_bytes_are_stored_again(
    root: Root, stored: bytes
) -> None:
    ref = RunLog(Root.open("memory://elsewhere")).put_segment("a", b"data", "arrow")
    root.create(ref.path, stored)
    assert RunLog(root).put_segment("a", b"data", "arrow") == ref
    assert RunLog(root).read_segment(ref) == b"data"
    assert root.leftovers(ref.path.rpartition("/")[0]) == []


@pytest.mark.parametrize(
    ("stored", "reason"),
    [(None, "missing"), (b"dat", "3 bytes, not 4"), (b"dat!!", "5 bytes"), (b"dada", "sha256")],
)
def test_damaged_segment_is_refused(root: Root, stored: bytes | None, reason: str) -> None:
    ref = RunLog(Root.open("memory://elsewhere2")).put_segment("a", b"data", "arrow")
    if stored is not None:
        root.create(ref.path, stored)
    with pytest.raises(CorruptError, match=reason):
        RunLog(root).read_segment(ref)


# ------------------------------------------------------------------ commits


def test_commit_is_read_back_with_floats_exact(root: Root) -> None:
    log = RunLog(root)
    log.open_epoch(None)
    ref = log.put_segment("a", b"data", "safetensors")
    log.commit(1, {"step": 3, "loss": 0.1 + 0.2, "run": {"x": None}}, [ref])
    body = log.read_commit(1)
    assert (body["step"], body["loss"], body["run"]) == (3, 0.1 + 0.2, {"x": None})
    assert (body["format"], body["min_reader"], body["kind"]) == ("esper-ckpt", 1, "run")
    assert (body["seq"], body["run_epoch"], body["writer"]["run_epoch"]) == (1, 1, 1)
    assert len(body["writer"]["nonce"]) == 32
    assert manifest.segments(body) == [ref]
    assert log.lineage() == [1]


def test_absent_commit_is_not_found(root: Root) -> None:
    with pytest.raises(CheckpointNotFound):
        RunLog(root).read_commit(1)


def test_commit_that_another_writer_created_is_fenced(root: Root) -> None:
    log = RunLog(root)
    log.open_epoch(None)
    log.commit(1, {"step": 1}, [])
    with pytest.raises(FencedError):
        RunLog.commit(log, 1, {"step": 2}, [])
    assert log.read_commit(1)["step"] == 1


def test_writer_of_an_older_start_is_fenced(root: Root) -> None:
    zombie = RunLog(root)
    zombie.open_epoch(None)
    RunLog(root).open_epoch(None)
    with pytest.raises(FencedError, match="started again"):
        zombie.commit(1, {"step": 1}, [])
    assert root.names("commits") == []


def test_foreign_object_of_any_length_is_fenced(root: Root) -> None:
    for name, data in {"short": b"x", "same": b"other", "long": b"x" * 50}.items():
        root.create(f"commits/{name}", data)
        with pytest.raises(FencedError):
            objects.create_or_confirm(root, f"commits/{name}", b"bytes")


def test_lost_reply_is_success(tmp_path: Path) -> None:
    root = UnreliableRoot.open(str(tmp_path))
    assert isinstance(root, UnreliableRoot)
    root.fail = "after"
    log = RunLog(root)
    assert log.open_epoch(None).run_epoch == 1
    log.commit(1, {"step": 1}, [])
    assert log.lineage() == [1]


def test_failed_commit_is_retried_with_the_same_bytes(tmp_path: Path) -> None:
    root = UnreliableRoot.open(str(tmp_path))
    assert isinstance(root, UnreliableRoot)
    log = RunLog(root)
    log.open_epoch(None)
    root.fail = "before"
    with pytest.raises(StorageUnavailable, match="no answer"):
        log.commit(1, {"step": 1}, [])
    root.fail = None
    log.commit(1, {"step": 1}, [])
    log.commit(1, {"step": 1}, [])
    assert log.lineage() == [1]


def test_misused_log_says_so(root: Root) -> None:
    log = RunLog(root)
    with pytest.raises(RuntimeError, match="open_epoch"):
        log.commit(1, {}, [])
    log.open_epoch(None)
    ref = log.put_segment("a", b"data", "arrow")
    with pytest.raises(ValueError, match="not this epoch's"):
        log.commit(0, {}, [])
    with pytest.raises(ValueError, match=r"\['seq'\]"):
        log.commit(1, {"seq": 1}, [])
    with pytest.raises(ValueError, match="twice"):
        log.commit(1, {}, [ref, ref])


def commit_bytes(**change: object) -> bytes:
    return manifest.encode({**objects.header("run", 1), "seq": 1, "segments": [], **change})


@pytest.mark.parametrize(
    "change",
    [
        {"seq": 2},
        {"kind": "epoch"},
        {"segments": None},
        {
            "segments": [
                {"name": "a", "file": "../../../x", "sha256": "0" * 64, "size": 1, "rows": 0}
            ]
        },
    ],
)
def test_forged_commit_is_refused(root: Root, change: dict[str, object]) -> None:
    root.create(commit_path(1), commit_bytes(**change))
    with pytest.raises(CorruptError, match="commits/"):
        RunLog(root).read_commit(1)


WRITER = """
import sys
from esper_ray.storage.commit_log import RunLog
from esper_ray.storage.filesystem import Root
log = RunLog(Root.open(sys.argv[1]))
seq = log.open_epoch(None).next_seq
while True:
    refs = [log.put_segment(f"s{i}", bytes([i, seq % 256]) * 20000, "arrow") for i in range(2)]
    part = log.put_log(seq, bytes([seq % 256]) * 30000, rows=3)
    log.commit(seq, {"step": seq}, refs, part)
    print(seq, flush=True)
    seq += 1
"""


def test_writer_killed_at_any_moment_leaves_only_whole_commits(tmp_path: Path) -> None:
    acknowledged: list[int] = []
    for turn in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, cwd=os.getcwd()
        )
        assert writer.stdout is not None
        with writer.stdout:
            acknowledged += [int(writer.stdout.readline()) for _ in range(2 + turn)]
            time.sleep(0.013 * turn)
            writer.send_signal(signal.SIGKILL)
            acknowledged += [int(line) for line in writer.stdout if line.endswith(b"\n")]
        writer.wait(timeout=20)
    log = RunLog(Root.open(str(tmp_path)))
    manager = RunCheckpoints(log)
    assert set(acknowledged) <= set(log.commit_numbers())
    for seq in log.commit_numbers():
        assert manager.load(seq)["step"] == seq
    assert [found for found in manager.verify() if found["severity"] == "damage"] == []
