"""Local disk: creation that is exclusive, atomic and durable, and reads that follow no link."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid

from esper_ray.errors import CorruptError, StorageUnavailable


def create_exclusive(path: str, data: bytes) -> None:
    """Create `path` whole and durable, or raise FileExistsError if the name is taken."""
    folder = os.path.dirname(path)
    _ensure_folder(folder)
    temp = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        _write_durably(temp, data)
        # Not os.replace, which overwrites; not O_EXCL on the name, which shows half an object.
        os.link(temp, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temp)
        # Also after FileExistsError: the winner may have died before it made the name durable.
        _sync_folder(folder)


def replace(path: str, data: bytes) -> None:
    """Put a whole and durable file in the place of `path`."""
    temp = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        _write_durably(temp, data)
        os.replace(temp, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temp)
        _sync_folder(os.path.dirname(path))


def remove(path: str) -> None:
    """Delete one name durably; one that is absent is gone already."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
        _sync_folder(os.path.dirname(path))


def modified(path: str) -> float:
    """When a name was last written, seconds since 1970; links are not followed."""
    return os.stat(path, follow_symlinks=False).st_mtime


def check_prefix(prefix: str) -> None:
    """Raise StorageUnavailable where `prefix` is, or lies below, something that is no folder."""
    place = prefix
    while not os.path.lexists(place) and place != os.path.dirname(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise StorageUnavailable(
            f"nothing can be stored at {prefix}: {place} is not a folder", "use another URL"
        )


def read_regular(path: str, limit: int) -> bytes:
    """Read one regular file of at most `limit` bytes; refuse links, folders and devices."""
    fd = _open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if size > limit:
            raise CorruptError(f"{path} has {size} bytes, at most {limit} were expected")
        with os.fdopen(fd, "rb", closefd=False) as stream:
            data = stream.read(size + 1)
    finally:
        os.close(fd)
    if len(data) != size:
        raise CorruptError(f"{path} changed while it was read")
    return data


def read_range(path: str, start: int, stop: int) -> bytes:
    """Bytes start..stop of one regular file, fewer where it ends before; links are refused."""
    fd = _open_regular(path)
    try:
        # A forger may name any range: no more is asked for than there is.
        stop = min(stop, os.fstat(fd).st_size)
        return os.pread(fd, stop - start, start) if start < stop else b""
    finally:
        os.close(fd)


def regular_size(path: str) -> int:
    """Bytes of one regular file; refuse links, folders and devices."""
    fd = _open_regular(path)
    try:
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


def below(prefix: str, path: str) -> str:
    """Absolute name of `path` under `prefix`; refuse a folder on the way that is a link."""
    *folders, name = path.split("/")
    place = prefix
    for folder in folders:
        place = os.path.join(place, folder)
        if os.path.islink(place):
            raise CorruptError(f"{place} is a symbolic link, which is refused")
    return os.path.join(place, name)


def _open_regular(path: str) -> int:
    try:
        # O_NONBLOCK: opening a pipe that nobody writes would wait for ever.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            raise CorruptError(f"{path} is not a regular file") from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CorruptError(f"{path} is not a regular file")
    return fd


def _write_durably(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def _ensure_folder(folder: str) -> None:
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    _ensure_folder(parent)
    try:
        os.mkdir(folder)
    except FileExistsError:
        if not os.path.isdir(folder):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder) from None
    _sync_folder(parent)


def _sync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
