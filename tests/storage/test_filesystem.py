"""URLs, replies of object stores, and what only a local disk can do."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.registry import _registry as registered

from esper_ray.errors import CorruptError, StorageUnavailable
from esper_ray.storage import local_disk
from esper_ray.storage.filesystem import Root


def raiser(error: Exception) -> Callable[..., Any]:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


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


@pytest.mark.parametrize("span", [(0, 2**40), (0, 2**62), (2**62, 2**62 + 8), (7, 9), (2, 2**63)])
def test_a_range_that_no_object_has_is_refused_and_takes_no_memory(
    tmp_path: Path, span: tuple[int, int]
) -> None:
    root = Root.open(str(tmp_path))
    root.create("a", b"12345")
    with pytest.raises(CorruptError, match=f"ends before byte {span[1]}"):
        root.read_ranges([("a", *span)])


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
