"""Retention and garbage collection: what is kept, what goes, and only after the grace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_ray.errors import CheckpointNotFound, ConfigError, CorruptError
from esper_ray.storage import gc_log, manifest, objects, pins
from esper_ray.storage.collection import PruneReport, prune
from esper_ray.storage.commit_log import RunLog
from esper_ray.storage.filesystem import Root
from esper_ray.storage.retention import Retention, kept
from esper_ray.storage.run_checkpoints import RunCheckpoints

HOUR = 3600.0
Later = Callable[[float], None]


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Later:
    """Let hours pass, for the collector and for what is written from then on."""
    passed, written = [0.0], dict[str, float]()
    now, create, replace, modified = gc_log.now, Root.create, Root.replace, Root.modified

    def noted(write: Callable[[Root, str, bytes], None]) -> Callable[[Root, str, bytes], None]:
        def call(root: Root, path: str, data: bytes) -> None:
            write(root, path, data)
            written[path] = passed[0]

        return call

    monkeypatch.setattr(gc_log, "now", lambda: now() + passed[0])
    monkeypatch.setattr(Root, "create", noted(create))
    monkeypatch.setattr(Root, "replace", noted(replace))
    monkeypatch.setattr(Root, "modified", lambda r, p: modified(r, p) + written.get(p, 0.0))

    def let(hours: float) -> None:
        passed[0] += hours * HOUR

    return let


def write(log: RunLog, seq: int) -> None:
    shared = log.put_segment("host", b"shared", "safetensors")
    own = log.put_segment("state", f"state {seq}".encode(), "arrow")
    part = log.put_log(seq, f"events {seq}".encode(), rows=1)
    log.commit(seq, {"step": 10 * seq, "epoch": seq}, [shared, own], part)


def run_of(root: Root, commits: int) -> RunLog:
    log = RunLog(root)
    log.open_epoch(None)
    for seq in range(1, commits + 1):
        write(log, seq)
    return log


def prune_twice(root: Root, later: Later, policy: Retention) -> PruneReport:
    later(25)
    prune(root, policy)
    later(25)
    return prune(root, policy)


# ------------------------------------------------------------------ retention


@given(
    history=st.sets(st.integers(1, 60)),
    given_up=st.sets(st.integers(1, 60)),
    pinned=st.sets(st.integers(1, 60)),
    last=st.integers(1, 10),
    every=st.integers(0, 7),
)
def test_kept_are_the_newest_each_kth_the_pinned_and_the_highest(
    history: set[int], given_up: set[int], pinned: set[int], last: int, every: int
) -> None:
    stored = history | given_up
    newest_first = sorted(history, reverse=True)
    found = kept(newest_first, stored, pinned, Retention(last, every))
    assert found <= stored
    assert found >= set(newest_first[:last]) | (pinned & stored) | set(sorted(stored)[-1:])
    assert found >= {seq for seq in history if every and seq % every == 0}
    extra = found - set(newest_first[:last]) - pinned - {max(stored, default=0)}
    assert all(every and seq % every == 0 and seq in history for seq in extra)


@pytest.mark.parametrize("wrong", [{"last": 0}, {"every": -1}])
def test_retention_of_nothing_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        Retention(**wrong)


# ------------------------------------------------------------------ passes


def test_prune_deletes_after_the_grace_what_nothing_kept_reaches(root: Root, later: Later) -> None:
    log = run_of(root, 6)
    pins.pin(root, "good", 2)
    policy = Retention(last=2)
    assert prune(root, policy).marked == ()  # all of it was just written
    later(25)
    first = prune(root, policy)
    assert (first.kept, first.deleted) == ((2, 5, 6), ())
    assert len(first.marked) == 6  # three commits, and the state of each
    assert prune(root, policy).waiting == first.marked
    later(25)
    second = prune(root, policy)
    assert sorted(second.deleted) == sorted(first.marked)
    assert second.deleted[:3] == tuple(objects.commit_path(seq) for seq in (1, 3, 4))
    assert log.commit_numbers() == [2, 5, 6]
    run = RunCheckpoints(log)
    assert run.verify() == []
    assert (run.resolve("latest"), run.resolve("step=50"), run.resolve("good")) == (6, 5, 2)
    for seq in (2, 5, 6):
        run.load(seq)
    assert prune(root, policy).marked == ()


def test_events_of_pruned_commits_are_still_told(root: Root, later: Later) -> None:
    log = run_of(root, 5)
    prune_twice(root, later, Retention(last=1))
    assert log.commit_numbers() == [5]
    parts = log.log_parts()
    assert [seq for seq, _ in parts] == [1, 2, 3, 4, 5]
    assert log.read_log(parts[0][1]) == b"events 1"
    assert log.open_epoch(5).next_seq == 6


def test_dry_run_changes_nothing(root: Root, later: Later) -> None:
    run_of(root, 3)
    later(25)
    would_mark = prune(root, Retention(last=1), dry_run=True)
    assert root.names("gc") == []
    assert prune(root, Retention(last=1)) == would_mark
    later(25)
    would_delete = prune(root, Retention(last=1), dry_run=True)
    assert len(would_delete.deleted) == 4
    assert prune(root, Retention(last=1)) == would_delete


def test_each_kth_commit_is_kept(root: Root, later: Later) -> None:
    log = run_of(root, 9)
    prune_twice(root, later, Retention(last=2, every=4))
    assert log.commit_numbers() == [4, 8, 9]


def test_commits_that_a_resume_gave_up_go_and_their_numbers_stay_used(
    root: Root, later: Later
) -> None:
    log = run_of(root, 4)
    assert log.open_epoch(2).next_seq == 5
    prune_twice(root, later, Retention(last=5))
    assert log.commit_numbers() == [1, 2, 4]  # 4 holds the place of the highest number
    assert RunLog(root).open_epoch(2).next_seq == 5
    write(log := RunLog(root, log.epochs()[-1]), 5)
    assert log.lineage() == [5, 2, 1]


def test_names_that_are_not_ours_stay(root: Root, later: Later) -> None:
    run_of(root, 3)
    strange = [
        *("segments/sha256/aa/notes.txt", "segments/other", "commits/copy.json", "notes.txt"),
        *("log/mine.arrow", "gc/readme", "pins/README", "layers/mine/x.json"),
    ]
    for path in strange:
        root.create(path, b"mine")
    prune_twice(root, later, Retention(last=1))
    for path in strange:
        assert root.read(path, 9) == b"mine"


def test_layer_manifests_keep_their_segments(root: Root, later: Later) -> None:
    log = run_of(root, 1)
    ref = log.put_segment("layer/a/state", b"rows", "arrow")
    orphan = log.put_segment("layer/a/state", b"of nobody", "arrow")
    body = {**objects.header("shard", 1), "segments": [ref.to_json()]}
    root.create(f"layers/{'0a' * 8}/e00000001/s0000/{1:020d}.json", manifest.encode(body))
    report = prune_twice(root, later, Retention())
    assert report.deleted == (orphan.path,)
    assert log.read_segment(ref) == b"rows"


@pytest.mark.parametrize("path", [objects.commit_path(1), "pins/good.json", "epochs/00000001.json"])
def test_prune_deletes_nothing_while_a_manifest_cannot_be_read(
    root: Root, later: Later, path: str
) -> None:
    log = run_of(root, 3)
    pins.pin(root, "good", 1)
    log.put_segment("x", b"of nobody", "arrow")
    later(25)
    prune(root, Retention())
    root.replace(path, b"{}")
    later(25)
    with pytest.raises(CorruptError, match=path.rpartition("/")[2]):
        prune(root, Retention())
    assert log.read_segment(log.put_segment("x", b"of nobody", "arrow"))


def test_grace_that_a_writer_could_lose_to_is_refused(root: Root) -> None:
    run_of(root, 2)
    with pytest.raises(ConfigError, match="a grace of 1 h"):
        prune(root, Retention(), HOUR)
    assert prune(root, Retention(last=1), 0, alone=True).marked
    assert prune(root, Retention(last=1), 0, alone=True).deleted


# ------------------------------------------------------------------ beside writers


def test_old_segment_that_is_needed_again_is_written_anew(root: Root, later: Later) -> None:
    log = run_of(root, 3)
    later(25)
    marked = prune(root, Retention(last=1)).marked
    later(25)
    needed = log.put_segment("state", b"state 1", "arrow")
    assert needed.path in marked
    deleted = prune(root, Retention(last=1)).deleted
    assert {*marked} - {*deleted} == {needed.path}  # no manifest names it yet
    log.commit(4, {"step": 40}, [needed])
    prune_twice(root, later, Retention(last=1))
    assert log.read_segment(needed) == b"state 1"


def test_sweep_that_was_killed_is_done_again(
    root: Root, later: Later, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = run_of(root, 4)
    later(25)
    prune(root, Retention(last=1))
    later(25)

    class Killed(BaseException):
        pass

    real, left = root.remove, [2]

    def remove(path: str) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        real(path)

    monkeypatch.setattr(root, "remove", remove)
    with pytest.raises(Killed):
        prune(root, Retention(last=1))
    left[0] = 99
    assert log.commit_numbers() == [3, 4]
    assert RunCheckpoints(log).load(4)["step"] == 40
    assert len(prune(root, Retention(last=1)).deleted) == 4
    assert log.commit_numbers() == [4]
    assert [seq for seq, _ in log.log_parts()] == [1, 2, 3, 4]


def test_writer_waits_for_a_sweep_that_names_its_segment(
    root: Root, later: Later, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = run_of(root, 1)
    path = log.put_segment("host", b"shared", "safetensors").path
    later(2)  # too old to be shared
    sweep = gc_log.append(root, "sweep", paths={path: 0.0}, commits=[])
    waits: list[float] = []

    def pause(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:  # the collector deletes what the writer had just written
            root.remove(path)
            gc_log.append(root, "done", sweep=sweep)

    monkeypatch.setattr(gc_log, "pause", pause)
    log.put_segment("host", b"shared", "safetensors")
    assert len(waits) == 2
    assert root.read(path, 99) == b"shared"


def test_writer_waits_no_longer_than_a_killed_sweep_can_delete(root: Root, later: Later) -> None:
    log = run_of(root, 1)
    path = log.put_segment("host", b"shared", "safetensors").path
    gc_log.append(root, "sweep", paths={path: 0.0}, commits=[])
    later(2)
    assert log.put_segment("host", b"shared", "safetensors").path == path


def test_pin_and_resume_of_a_commit_that_is_being_deleted_are_refused(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = run_of(root, 3)
    path = objects.commit_path(1)

    def sweep_under_way() -> int:
        return gc_log.append(root, "sweep", paths={path: 0.0}, commits=[])

    def pause(_: float) -> None:
        root.remove(path)
        gc_log.append(root, "done", sweep=max(gc_log.record_numbers(root)))

    monkeypatch.setattr(gc_log, "pause", pause)
    sweep_under_way()
    with pytest.raises(CheckpointNotFound, match="no commit 1"):
        pins.pin(root, "late", 1)
    assert root.names("pins") == []
    path = objects.commit_path(2)
    sweep_under_way()
    with pytest.raises(CheckpointNotFound, match="it was pruned"):
        log.open_epoch(2)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "run"},
        {"paths": []},
        {"paths": {"a": "b"}},
        {"commits": {}},
        {"commits": [{"seq": "1"}]},
        {"commits": [{"seq": 1, "log": {"file": "../x"}}]},
        {"sweep": 1},
    ],
)
def test_forged_record_of_a_collection_is_refused(root: Root, change: dict[str, object]) -> None:
    run_of(root, 2)
    body = {**objects.header("sweep", 0), "paths": {}, "commits": [], **change}
    root.create(gc_log.gc_path(1), manifest.encode(body))
    with pytest.raises(CorruptError, match=r"gc/0+1\.json"):
        prune(root, Retention())
