"""What every store must do, shown on each: local disk, memory, two S3 servers, GCS and Azure."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from esper_ray.errors import CheckpointNotFound, CorruptError, FencedError
from esper_ray.storage import objects
from esper_ray.storage.commit_log import RunLog
from esper_ray.storage.filesystem import Root
from esper_ray.storage.objects import commit_path
from tests.servers.fixtures import Place

# ------------------------------------------------------------------ objects


def test_opening_writes_nothing(any_root: Root) -> None:
    assert any_root.names("") == []


def test_created_object_is_read_back(any_root: Root) -> None:
    any_root.create("a/b/c.bin", b"hello")
    assert any_root.read("a/b/c.bin", 5) == b"hello"
    assert any_root.size("a/b/c.bin") == 5
    assert any_root.names("a/b") == ["c.bin"]
    assert any_root.names("a") == ["b"]
    assert any_root.names("") == ["a"]


def test_second_create_conflicts_and_changes_nothing(any_root: Root) -> None:
    any_root.create("a/x", b"first")
    with pytest.raises(FileExistsError):
        any_root.create("a/x", b"second")
    assert any_root.read("a/x", 100) == b"first"
    assert any_root.leftovers("a") == []


def test_replaced_object_has_the_new_bytes(any_root: Root) -> None:
    any_root.create("a/x", b"first")
    any_root.replace("a/x", b"the second")
    assert any_root.read("a/x", 100) == b"the second"


def test_time_of_an_object_is_that_of_its_last_write(any_root: Root) -> None:
    any_root.create("a/x", b"first")
    assert abs(any_root.modified("a/x") - time.time()) < 60
    with pytest.raises(FileNotFoundError):
        any_root.modified("a/y")


def test_removed_object_is_gone_and_may_be_removed_again(any_root: Root) -> None:
    any_root.create("a/x", b"1")
    any_root.remove("a/x")
    any_root.remove("a/x")
    assert any_root.names("a") == []
    any_root.create("a/x", b"2")
    assert any_root.read("a/x", 1) == b"2"


def test_absent_object_is_file_not_found(any_root: Root) -> None:
    with pytest.raises(FileNotFoundError):
        any_root.read("no/such", 10)
    with pytest.raises(FileNotFoundError):
        any_root.size("no/such")
    with pytest.raises(FileNotFoundError):
        any_root.read_ranges([("no/such", 0, 1)])
    assert any_root.names("no") == []


def test_folder_is_no_object(any_root: Root) -> None:
    any_root.create("a/b/c", b"1")
    with pytest.raises((FileNotFoundError, CorruptError)):
        any_root.read("a/b", 10)
    with pytest.raises((FileNotFoundError, CorruptError)):
        any_root.size("a")


def test_object_over_the_limit_is_refused(any_root: Root) -> None:
    any_root.create("x", b"12345")
    with pytest.raises(CorruptError, match="5 bytes, at most 4"):
        any_root.read("x", 4)


def test_ranges_are_read_as_asked(any_root: Root) -> None:
    any_root.create("a/x", b"0123456789")
    any_root.create("a/y", b"abcdef")
    wanted = [("a/x", 2, 5), ("a/y", 0, 6), ("a/x", 9, 10)]
    assert any_root.read_ranges(wanted) == [b"234", b"abcdef", b"9"]
    with pytest.raises(CorruptError, match="ends before byte 12"):
        any_root.read_ranges([("a/x", 8, 12)])


def test_large_object_is_whole(any_root: Root) -> None:
    data = bytes(range(256)) * (9 << 12)  # 9 MiB
    any_root.create("large", data)
    assert any_root.read("large", len(data)) == data


@pytest.mark.soak
def test_object_that_is_sent_in_parts_is_created_once_too(any_root: Root) -> None:
    data = bytes(range(256)) * (101 << 12)  # 101 MiB; s3fs sends more than 100 in parts
    any_root.create("large", data)
    for other in (data[::-1], b"small"):
        with pytest.raises(FileExistsError):
            any_root.create("large", other)
    assert any_root.read("large", len(data)) == data


def test_listing_is_sorted_and_shows_what_another_client_did(place: Place) -> None:
    ours, theirs = place.root("listing" + str(time.time_ns())), None
    assert ours.names("a") == []
    theirs = pickle.loads(pickle.dumps(ours))
    names = [f"{number:020d}.json" for number in range(12)]
    for name in reversed(names):
        theirs.create(f"a/{name}", b"1")
        assert name in ours.names("a")
    theirs.create("a/x.json.0123.tmp", b"1")
    assert ours.names("a") == names
    assert ours.leftovers("a") == ["x.json.0123.tmp"]


BAD_PATHS = ["../x", "a/../../x", "/etc/passwd", "a//b", "", "a\\b", "a\0b", "a?versionId=3", "a#1"]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_path_outside_the_prefix_is_refused(root: Root, path: str) -> None:
    for call in (root.size, root.remove, lambda p: root.create(p, b"1"), lambda p: root.read(p, 1)):
        with pytest.raises(ValueError, match="not a path below"):
            call(path)


@pytest.mark.parametrize("name", ["with space", "ünïcode-✓", "a+b&c=d%2F"])
def test_unusual_name_is_one_object(any_root: Root, name: str) -> None:
    any_root.create(f"a/{name}", b"1")
    assert any_root.names("a") == [name]
    assert any_root.read(f"a/{name}", 1) == b"1"
    with pytest.raises(FileExistsError):
        any_root.create(f"a/{name}", b"2")


def test_root_travels_by_pickle_and_below_stays_inside(any_root: Root) -> None:
    any_root.create("a/x", b"1")
    again = pickle.loads(pickle.dumps(any_root))
    assert (again.url, again.local) == (any_root.url, any_root.local)
    assert again.read("a/x", 1) == b"1"
    assert again.below("a").read("x", 1) == b"1"


# ------------------------------------------------------------------ races


@pytest.fixture
def eager_threads(any_root: Root) -> Iterator[None]:
    """Let threads change places often, else a look-then-write store wins races by luck."""
    interval = sys.getswitchinterval()
    if any_root.local or any_root.url.startswith("memory:"):  # others race in their server
        sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_threads")
def test_eight_threads_have_exactly_one_winner(any_root: Root) -> None:
    fast = any_root.local or any_root.url.startswith("memory:")
    for turn in range(20 if fast else 4):  # SeaweedFS makes those who wait for a name wait 1 s
        barrier, wins = threading.Barrier(8), list[int]()

        def attempt(who: int, barrier: threading.Barrier, wins: list[int], path: str) -> None:
            barrier.wait()
            try:
                any_root.create(path, bytes([who]) * 100)
            except FileExistsError:
                return
            wins.append(who)

        threads = [
            threading.Thread(target=attempt, args=(who, barrier, wins, f"race/{turn}"))
            for who in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(wins) == 1
        assert any_root.read(f"race/{turn}", 100) == bytes(wins) * 100
    assert any_root.leftovers("race") == []


RACER = """
import pickle, sys, time
root = pickle.loads(sys.stdin.buffer.read())
root.names("")
print("ready", flush=True)
while not root.names("go"):
    time.sleep(0.01)
wins = []
for turn in range(10):
    try:
        root.create(f"race/{turn}", sys.argv[1].encode())
        wins.append(turn)
    except FileExistsError:
        pass
print(*wins)
"""


def test_three_processes_have_exactly_one_winner(any_root: Root) -> None:
    if any_root.url.startswith("memory:"):
        return  # the memory of one process
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(who)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for who in range(3)
    ]
    outputs = []
    try:
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write(pickle.dumps(any_root))
            racer.stdin.close()
            racer.stdin = None
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == b"ready\n"
        any_root.create("go/now", b"1")
        outputs = [racer.communicate(timeout=60)[0] for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
    wins = {who: [int(turn) for turn in told.split()] for who, told in enumerate(outputs)}
    assert sorted(turn for turns in wins.values() for turn in turns) == list(range(10))
    for who, turns in wins.items():
        assert all(any_root.read(f"race/{turn}", 1) == str(who).encode() for turn in turns)


# ------------------------------------------------------------------ the log of a run


def test_run_is_committed_continued_and_given_up(any_root: Root) -> None:
    log = RunLog(any_root)
    assert log.open_epoch(None).run_epoch == 1
    ref = log.put_segment("a", b"data", "arrow", rows=1)
    part = log.put_log(1, b"events", rows=2)
    log.commit(1, {"step": 10}, [ref], part)
    log.commit(2, {"step": 20}, [ref])
    body = log.read_commit(1)
    assert (body["step"], log.read_segment(ref), log.read_log(part)) == (10, b"data", b"events")
    again = RunLog(pickle.loads(pickle.dumps(any_root)))
    assert again.open_epoch(resumed_from=1).next_seq == 3
    again.commit(3, {"step": 15}, [again.put_segment("a", b"data", "arrow", rows=1)])
    assert RunLog(any_root).lineage() == [3, 1]
    assert RunLog(any_root).commit_numbers() == [1, 2, 3]
    with pytest.raises(CheckpointNotFound):
        log.read_commit(4)


def test_two_writers_of_one_number_are_told_apart(any_root: Root) -> None:
    first = RunLog(any_root)
    record = first.open_epoch(None)
    second = RunLog(any_root, record)
    first.commit(1, {"step": 1}, [])
    with pytest.raises(FencedError, match="another writer"):
        second.commit(1, {"step": 1}, [])
    first.commit(1, {"step": 1}, [])  # the same writer again: its own bytes
    RunLog(any_root).open_epoch(None)
    with pytest.raises(FencedError, match="started again"):
        first.commit(2, {"step": 2}, [])
    assert any_root.names("commits") == [f"{1:020d}.json"]


def test_four_starts_at_once_take_four_numbers(any_root: Root) -> None:
    told: list[int] = []

    def start() -> None:
        told.append(RunLog(any_root).open_epoch(None).run_epoch)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(told) == list(range(1, 5))
    assert RunLog(any_root).epoch_numbers() == list(range(1, 5))


def test_damaged_segment_is_replaced_when_its_bytes_are_stored_again(any_root: Root) -> None:
    log = RunLog(any_root)
    ref = log.put_segment("a", b"data", "arrow")
    any_root.replace(ref.path, b"dada")
    with pytest.raises(CorruptError, match="sha256"):
        log.read_segment(ref)
    assert log.put_segment("a", b"data", "arrow") == ref
    assert log.read_segment(ref) == b"data"


def test_object_that_stands_there_is_ours_or_anothers(any_root: Root) -> None:
    objects.create_or_confirm(any_root, commit_path(1), b"ours")
    objects.create_or_confirm(any_root, commit_path(1), b"ours")
    for other in (b"theirs", b"more"):
        with pytest.raises(FencedError):
            objects.create_or_confirm(any_root, commit_path(1), other)
