"""Copies, repair and restores from a replica: the same bytes or an error, and never in silence."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_ray.errors import CheckpointNotFound, CorruptError, FencedError
from esper_ray.storage import gc_log, manifest, objects, pins
from esper_ray.storage.collection import prune
from esper_ray.storage.commit_log import RunLog
from esper_ray.storage.copying import copy_commit, copy_run
from esper_ray.storage.filesystem import Root
from esper_ray.storage.repair import repair
from esper_ray.storage.retention import Retention
from esper_ray.storage.run_checkpoints import RunCheckpoints


@pytest.fixture
def replica() -> Root:
    return Root.open(f"memory://{uuid.uuid4().hex}/replica")


@pytest.fixture
def log(root: Root) -> RunLog:
    log = RunLog(root)
    fill(log)
    return log


def fill(log: RunLog) -> None:
    log.open_epoch(None)
    for seq in range(1, 5):
        write(log, seq)
    pins.pin(log.root, "good", 2)


def write(log: RunLog, seq: int) -> None:
    refs = [
        log.put_segment("host", b"shared", "safetensors"),
        log.put_segment("state", f"state {seq}".encode(), "arrow"),
    ]
    log.commit(seq, {"step": 10 * seq}, refs, log.put_log(seq, f"events {seq}".encode(), 1))


def everything(root: Root, folder: str = "") -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name in root.names(folder):
        path = f"{folder}/{name}" if folder else name
        found |= {path: root.read(path, 10_000)} if "." in name else everything(root, path)
    return found


# ------------------------------------------------------------------ copy


def test_copy_of_a_run_is_the_run(log: RunLog, replica: Root) -> None:
    for _ in range(2):
        prune(log.root, Retention(last=3), 0, alone=True)
    first = copy_run(log.root, replica)
    assert everything(replica) == everything(log.root)
    assert (len(first.written), first.present) == (len(everything(replica)), 0)
    log.root.replace(gc_log.gc_path(1), b"damaged")
    assert repair(log.root, [replica]).healed == {gc_log.gc_path(1): replica.url}
    again = copy_run(log.root, replica)
    assert (again.written, again.present, again.bytes_written) == ((), len(first.written), 0)
    write(log, 5)
    assert len(copy_run(log.root, replica).written) == 3
    assert RunCheckpoints(RunLog(replica)).verify() == []
    assert RunCheckpoints(RunLog(replica)).resolve("good") == 2


def test_copy_of_one_commit_can_be_resumed_alone(log: RunLog, replica: Root) -> None:
    copy_commit(log.root, replica, 3)
    copied = RunLog(replica)
    assert copied.commit_numbers() == [3]
    assert RunCheckpoints(copied).verify() == []
    assert RunCheckpoints(copied).resolve("latest") == 3
    assert [copied.read_log(part) for _, part in copied.log_parts()] == [
        f"events {seq}".encode() for seq in (1, 2, 3)
    ]
    before = everything(replica)
    assert copy_commit(log.root, replica, 3).written == ()
    assert everything(replica) == before
    copy_commit(log.root, replica, 4)
    assert RunCheckpoints(copied).resolve("latest") == 4
    copy_run(log.root, Root.open(replica.url + "2"))


def test_copy_of_a_commit_that_was_given_up_is_the_newest_there(log: RunLog, replica: Root) -> None:
    log.open_epoch(2)
    copy_commit(log.root, replica, 4)
    before = everything(replica)
    copy_commit(log.root, replica, 4)
    assert everything(replica) == before
    assert RunCheckpoints(RunLog(replica)).resolve("latest") == 4


def test_copy_heals_what_is_damaged_at_the_target(log: RunLog, replica: Root) -> None:
    copy_run(log.root, replica)
    for path, data in everything(replica).items():
        if not path.startswith("log/"):
            replica.replace(path, data[:-1] + b"?")
            assert copy_run(log.root, replica).written == (path,)
    assert everything(replica) == everything(log.root)


def test_copy_to_a_place_that_was_pruned_by_itself(log: RunLog, replica: Root) -> None:
    copy_run(log.root, replica)
    for place, last in ((replica, 1), (log.root, 2)):
        for _ in range(2):
            prune(place, Retention(last), 0, alone=True)
    write(log, 5)
    copy_run(log.root, replica)
    assert RunLog(replica).commit_numbers() == [2, 3, 4, 5]
    assert RunCheckpoints(RunLog(replica)).verify() == []
    assert len(RunLog(replica).log_parts()) == 5
    log.root.replace(gc_log.gc_path(1), b"damaged")
    assert repair(log.root, [replica]).healed == {}  # the other's record is not this one's


def test_copy_over_another_run_is_refused(log: RunLog, replica: Root) -> None:
    RunLog(replica).open_epoch(None)
    with pytest.raises(FencedError, match="belongs to another run"):
        copy_run(log.root, replica)
    assert RunLog(replica).commit_numbers() == []


def test_damaged_source_shows_no_new_commit(log: RunLog, replica: Root) -> None:
    path = manifest.segments(log.read_commit(4))[1].path
    log.root.replace(path, b"damaged")
    with pytest.raises(CorruptError):
        copy_run(log.root, replica)
    assert RunLog(replica).commit_numbers() == []
    copy_commit(log.root, replica, 3)
    assert RunCheckpoints(RunLog(replica)).load(3)["step"] == 30
    with pytest.raises(CheckpointNotFound):
        copy_commit(log.root, replica, 9)


# ------------------------------------------------------------------ repair


def test_every_damaged_or_lost_object_is_healed(replica: Root) -> None:
    log = RunLog(Root.open(f"memory://{uuid.uuid4().hex}/run"))
    fill(log)
    copy_run(log.root, replica)
    whole = everything(log.root)
    for path, data in whole.items():
        log.root.replace(path, data[: len(data) // 2])
        assert repair(log.root, [replica]).healed == {path: replica.url}
        assert everything(log.root) == whole
        log.root.remove(path)
        known = not path.startswith("pins/")
        assert repair(log.root, [replica]).healed == ({path: replica.url} if known else {})
        if not known:
            log.root.create(path, data)
    assert repair(log.root, [replica]).healed == {}


def test_all_objects_at_once_are_healed(log: RunLog, replica: Root) -> None:
    copy_run(log.root, replica)
    whole = everything(log.root)
    for path in whole:
        log.root.replace(path, b"damaged")
    report = repair(log.root, [replica])
    assert report.healed.keys() == whole.keys()
    assert report.left == ()
    assert everything(log.root) == whole


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_whatever_one_of_two_places_has_whole_is_healed(data: st.DataObject) -> None:
    root, replica = (Root.open(f"memory://{uuid.uuid4().hex}/run") for _ in range(2))
    fill(RunLog(root))
    copy_run(root, replica)
    whole = everything(root)
    damaged = st.sets(st.sampled_from(sorted(whole)))
    here, there = data.draw(damaged), data.draw(damaged)
    for place, paths in ((root, here), (replica, there)):
        for path in paths:
            place.replace(path, b"damaged")
    left = here & there
    for seq in range(1, 5):  # only its commit says what a part of the event log must be
        part = f"log/{manifest.log_file(1, seq)}"
        if objects.commit_path(seq) in left and part in here:
            left.add(part)
    report = repair(root, [replica])
    assert everything(root) == {**whole, **dict.fromkeys(left, b"damaged")}
    assert {p["object"] for p in report.left if p["severity"] == "damage"} <= left | {
        pins.pin_path("good")
    }


def test_replica_that_is_damaged_too_heals_nothing(log: RunLog, replica: Root) -> None:
    copy_run(log.root, replica)
    ref = manifest.segments(log.read_commit(1))[0]
    for place in (log.root, replica):
        place.replace(ref.path, b"damage")
    report = repair(log.root, [replica])
    assert (report.healed, [p["object"] for p in report.left]) == ({}, [ref.path])
    assert log.root.read(ref.path, 99) == b"damage"


def test_replica_of_another_run_is_refused(log: RunLog, replica: Root) -> None:
    other = RunLog(replica)
    other.open_epoch(None)
    log.root.replace(objects.commit_path(1), b"{}")
    with pytest.raises(FencedError, match="holds another run"):
        repair(log.root, [replica])


def test_repair_removes_old_temporary_files_only(
    local_log: RunLog, local_folder: Path, replica: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_run(local_log.root, replica)
    (local_folder / "commits" / "x.json.0.tmp").write_bytes(b"half")
    (local_folder / "notes.txt").write_bytes(b"mine")
    assert repair(local_log.root, [replica]).removed == ()
    now = gc_log.now
    monkeypatch.setattr(gc_log, "now", lambda: now() + 25 * 3600)
    assert repair(local_log.root, [replica]).removed == ("commits/x.json.0.tmp",)
    assert (local_folder / "notes.txt").exists()


# ------------------------------------------------------------------ restore


@pytest.mark.parametrize("how", ["missing", "short", "changed"])
def test_damaged_objects_are_read_from_a_replica_and_reported(
    log: RunLog, replica: Root, how: str
) -> None:
    copy_run(log.root, replica)
    paths = [ref.path for ref in manifest.references(log.read_commit(4))]
    for path in paths:
        if how == "missing":
            log.root.remove(path)
        else:
            log.root.replace(path, b"x" if how == "short" else b"x" * log.root.size(path))
    healed = RunLog(log.root, replicas=[replica])
    assert RunCheckpoints(healed).load(4)["step"] == 40
    assert healed.sources.report.replaced == dict.fromkeys(paths, replica.url)
    assert len(healed.sources.report.lines()) == len(paths) + 1
    with pytest.raises(CorruptError):
        RunCheckpoints(RunLog(log.root)).load(4)


def test_damaged_manifest_is_read_from_a_replica(log: RunLog, replica: Root) -> None:
    copy_run(log.root, replica)
    log.root.replace(objects.commit_path(4), b"{}")
    healed = RunLog(log.root, replicas=[replica])
    assert RunCheckpoints(healed).load(4)["step"] == 40
    assert healed.sources.report.replaced == {objects.commit_path(4): replica.url}


def test_what_no_replica_heals_falls_back_to_the_commit_before(log: RunLog, replica: Root) -> None:
    copy_run(log.root, replica)
    for seq in (3, 4):
        path = manifest.segments(log.read_commit(seq))[1].path
        log.root.remove(path)
        if seq == 4:
            replica.replace(path, b"damaged")
    said: list[str] = []
    healed = RunLog(log.root, replicas=[replica])
    found = RunCheckpoints(healed).newest_valid(said.append)
    assert found is not None
    assert found[0] == 3
    assert list(healed.sources.report.passed_over) == [4]
    assert len(healed.sources.report.replaced) == 1
    assert "checkpoint 4 is damaged and is passed over" in said[0]


class Silent:
    url = "nowhere"

    def read(self, path: str, limit: int) -> bytes:
        raise FileNotFoundError(path, limit)


class Liar:
    url = "elsewhere"

    def read(self, path: str, limit: int) -> bytes:
        return b"x" * limit if "segments" in path else b"{}"


def test_replicas_are_asked_in_turn_and_none_is_believed(log: RunLog, replica: Root) -> None:
    copy_run(log.root, replica)
    ref = manifest.segments(log.read_commit(4))[0]
    log.root.remove(ref.path)
    assert RunLog(log.root, replicas=[Silent(), Liar(), replica]).read_segment(ref) == b"shared"
    with pytest.raises(CorruptError, match="is missing"):
        RunLog(log.root, replicas=[Silent(), Liar()]).read_segment(ref)
