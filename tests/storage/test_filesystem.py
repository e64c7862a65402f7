"""One contract for every backend, then what only a local disk can do."""

from __future__ import annotations

import errno
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.registry import _registry as registered

from esper_ray.errors import CorruptError, StorageUnavailable
from esper_ray.storage import filesystem, local_disk
from esper_ray.storage.filesystem import Root


def raiser(error: Exception) -> Callable[..., Any]:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


# ------------------------------------------------------------------ contract


def test_opening_writes_nothing(root: Root, tmp_path: Path) -> None:
    assert root.names("") == []
    assert list(tmp_path.iterdir()) == []


def test_created_object_is_read_back(root: Root) -> None:
    root.create("a/b/c.bin", b"hello")
    assert root.read("a/b/c.bin", 5) == b"hello"
    assert root.size("a/b/c.bin") == 5
    assert root.names("a/b") == ["c.bin"]
    assert root.names("a") == ["b"]


def test_second_create_conflicts_and_changes_nothing(root: Root) -> None:
    root.create("a/x", b"first")
    with pytest.raises(FileExistsError):
        root.create("a/x", b"second")
    assert root.read("a/x", 100) == b"first"
    assert root.leftovers("a") == []


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Let threads change places often, else a look-then-write store wins races by luck."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_threads")
def test_eight_threads_have_exactly_one_winner(root: Root) -> None:
    for turn in range(20):
        barrier, wins = threading.Barrier(8), list[int]()

        def attempt(who: int, barrier: threading.Barrier, wins: list[int], path: str) -> None:
            barrier.wait()
            try:
                root.create(path, bytes([who]) * 100)
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
        assert root.read(f"race/{turn}", 100) == bytes(wins) * 100
    assert root.leftovers("race") == []


def test_absent_object_is_file_not_found(root: Root) -> None:
    with pytest.raises(FileNotFoundError):
        root.read("no/such", 10)
    with pytest.raises(FileNotFoundError):
        root.size("no/such")
    assert root.names("no") == []


def test_object_over_the_limit_is_refused(root: Root) -> None:
    root.create("x", b"12345")
    with pytest.raises(CorruptError, match="5 bytes, at most 4"):
        root.read("x", 4)


def test_temporary_names_are_not_listed(root: Root) -> None:
    root.create("a/b.json", b"1")
    root.create("a/c.json.0123.tmp", b"1")
    assert root.names("a") == ["b.json"]
    assert root.leftovers("a") == ["c.json.0123.tmp"]


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "a//b", "", "a\\b", "a\0b"])
def test_path_outside_the_prefix_is_refused(root: Root, path: str) -> None:
    with pytest.raises(ValueError, match="not a path below"):
        root.create(path, b"1")
    with pytest.raises(ValueError, match="not a path below"):
        root.read(path, 1)
    with pytest.raises(ValueError, match="not a path below"):
        root.size(path)


def test_root_travels_by_pickle(root: Root) -> None:
    root.create("x", b"1")
    again = pickle.loads(pickle.dumps(root))
    assert again.url == root.url
    assert again.local == root.local
    assert again.read("x", 1) == b"1"


# ------------------------------------------------------------------ URLs


def test_plain_path_becomes_an_absolute_file_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = f"file://{tmp_path}/runs/a"
    assert Root.open("runs/a").url == expected
    assert Root.open("runs/x/../a/").url == expected
    assert Root.open(f"{expected}/").url == expected
    assert Root.open(f"local://{tmp_path}/runs/a").url == expected
    assert Root.open("runs/a").local


def test_memory_url_is_kept_without_its_last_slash() -> None:
    root = Root.open("memory://x/y/", {"skip_instance_cache": True})
    assert (root.url, root.local) == ("memory://x/y", False)


def test_options_stay_out_of_the_representation() -> None:
    assert "word" not in repr(Root.open("memory://x", {"secret": "word"}))


@pytest.mark.parametrize("url", ["", "  "])
def test_empty_url_is_refused(url: str) -> None:
    with pytest.raises(StorageUnavailable, match="empty"):
        Root.open(url)


@pytest.mark.parametrize("url", ["nope://x", "simplecache::memory://x"])
def test_unknown_scheme_names_the_url(url: str) -> None:
    with pytest.raises(StorageUnavailable, match=url) as caught:
        Root.open(url)
    assert "s3://" in caught.value.hint


def test_url_without_a_place_is_refused() -> None:
    with pytest.raises(StorageUnavailable, match="names no place"):
        Root.open("memory://")


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [("s3://b/p", "s3fs", "s3"), ("gs://b/p", "gcsfs", "gcs"), ("az://b/p", "adlfs", "azure")],
)
def test_missing_package_names_the_extra(
    url: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(registered, url.partition(":")[0], raising=False)
    with pytest.raises(StorageUnavailable, match=url) as caught:
        Root.open(url)
    assert caught.value.hint == f"pip install 'esper-ray[{extra}]'"


def test_refused_storage_option_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = raiser(TypeError("unexpected option"))
    monkeypatch.setattr(fsspec, "get_filesystem_class", lambda _: kind)
    with pytest.raises(StorageUnavailable, match="unexpected option"):
        Root.open("memory://x")


# ------------------------------------------------------------------ replies of object stores


class ClientError(Exception):
    """Shaped as botocore's error."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}}


def remote() -> Root:
    return Root.open("memory://remote", {"skip_instance_cache": True})


def test_conflict_reported_as_another_error_is_still_a_conflict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, error = remote(), OSError(errno.EINVAL, "Invalid argument")
    error.__cause__ = ClientError("412")
    monkeypatch.setattr(root._fs, "pipe_file", raiser(error))
    with pytest.raises(FileExistsError):
        root.create("x", b"1")


@pytest.mark.parametrize("error", [ClientError("AccessDenied"), FileNotFoundError("no bucket")])
def test_failed_remote_write_is_storage_unavailable(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = remote()
    monkeypatch.setattr(root._fs, "pipe_file", raiser(error))
    with pytest.raises(StorageUnavailable, match="cannot write memory://remote/x") as caught:
        root.create("x", b"1")
    assert caught.value.hint


def test_failed_remote_list_is_storage_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    root = remote()
    monkeypatch.setattr(root._fs, "ls", raiser(ClientError("SlowDown")))
    with pytest.raises(StorageUnavailable, match="cannot list"):
        root.names("commits")


def test_truncated_reply_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    root = remote()
    monkeypatch.setattr(root._fs, "info", lambda _: {"size": 5})
    monkeypatch.setattr(root._fs, "cat_file", lambda _: b"123")
    with pytest.raises(CorruptError, match="3 of 5"):
        root.read("x", 10)


# ------------------------------------------------------------------ local disk


def test_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"s")
    root = Root.open(str(tmp_path / "run"))
    root.create("a/x", b"1")
    (tmp_path / "run/a/link").symlink_to(tmp_path / "secret")
    with pytest.raises(CorruptError, match="not a regular file"):
        root.read("a/link", 10)
    with pytest.raises(CorruptError, match="not a regular file"):
        root.size("a/link")
    with pytest.raises(FileExistsError):
        root.create("a/link", b"2")


def test_linked_folder_is_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x").write_bytes(b"1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/a").symlink_to(outside)
    root = Root.open(str(tmp_path / "run"))
    with pytest.raises(CorruptError, match="symbolic link"):
        root.read("a/x", 1)
    with pytest.raises(CorruptError, match="symbolic link"):
        root.create("a/y", b"1")
    assert sorted(outside.iterdir()) == [outside / "x"]


def test_prefix_may_itself_be_reached_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    root = Root.open(str(tmp_path / "alias"))
    root.create("a/x", b"1")
    assert root.read("a/x", 1) == b"1"


def test_pipe_and_folder_are_refused(tmp_path: Path) -> None:
    root = Root.open(str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(CorruptError, match="not a regular file"):
            root.read(name, 10)


def test_file_where_a_folder_belongs_is_reported(tmp_path: Path) -> None:
    root = Root.open(str(tmp_path))
    root.create("commits", b"1")
    with pytest.raises(CorruptError, match="not a folder"):
        root.names("commits")
    with pytest.raises(CorruptError, match="not a regular file"):
        root.read("commits/x", 1)
    with pytest.raises(StorageUnavailable, match="Not a directory"):
        root.create("commits/x", b"1")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "space"),
        (errno.EROFS, "permissions"),
        (errno.EACCES, "permissions"),
        (errno.EOPNOTSUPP, "hard links"),
        (errno.EIO, "check that the URL"),
    ],
)
def test_refused_write_is_storage_unavailable_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    root = Root.open(str(tmp_path))
    monkeypatch.setattr(os, "link", raiser(OSError(number, os.strerror(number))))
    with pytest.raises(StorageUnavailable, match=os.strerror(number)) as caught:
        root.create("x", b"1")
    assert remedy in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Root.open(str(tmp_path))
    monkeypatch.setattr(os, "fsync", raiser(OSError(errno.ENOSPC, "full")))
    with pytest.raises(StorageUnavailable, match="full"):
        root.create("x", b"1")
    assert list(tmp_path.iterdir()) == []


def test_unreadable_object_is_storage_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Root.open(str(tmp_path))
    root.create("x", b"1")
    monkeypatch.setattr(os, "open", raiser(PermissionError(errno.EACCES, "denied")))
    with pytest.raises(StorageUnavailable, match=r"cannot read .*denied"):
        root.read("x", 1)


def test_file_that_shrinks_while_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Root.open(str(tmp_path))
    root.create("x", b"12345")
    fstat = os.fstat

    def larger(fd: int) -> os.stat_result:
        values = list(fstat(fd))
        values[6] = 9
        return os.stat_result(values)

    monkeypatch.setattr(os, "fstat", larger)
    with pytest.raises(CorruptError, match="changed"):
        root.read("x", 10)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:2]))
    local_disk.create_exclusive(str(tmp_path / "x"), b"12345")
    assert (tmp_path / "x").read_bytes() == b"12345"


def test_folder_made_by_another_thread_meanwhile_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = os.mkdir

    def twice(path: str) -> None:
        mkdir(path)
        mkdir(path)

    monkeypatch.setattr(os, "mkdir", twice)
    Root.open(str(tmp_path)).create("a/x", b"1")
    assert (tmp_path / "a/x").read_bytes() == b"1"


def test_error_code_is_empty_without_a_response() -> None:
    assert filesystem._error_code(OSError()) == ""
