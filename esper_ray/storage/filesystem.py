"""One run's prefix on any fsspec file system: objects are created once, and replaced if damaged."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from esper_ray.errors import CorruptError, EsperError, StorageUnavailable
from esper_ray.storage import local_disk
from esper_ray.storage.remote import RemoteStore
from esper_ray.storage.remote_errors import Failure, classify
from esper_ray.storage.urls import split_scheme

TIMEOUT_S: Final = 30.0
"""Seconds that one call to a remote store may take, all its repetitions together."""

_TEMPORARY = ".tmp"
_REFUSED = frozenset("\0\\?#")


class Root:
    """A file system confined to one prefix; it can be pickled and opens again on arrival."""

    def __init__(
        self, url: str, options: Mapping[str, object], timeout_s: float, unsafe: bool
    ) -> None:
        self._options, self._timeout_s, self.unsafe = dict(options), timeout_s, unsafe
        scheme, rest = split_scheme(url)
        self.local = scheme == "file"
        if self.local:
            self._prefix = os.path.abspath(os.path.expanduser(rest))
            self.url = f"file://{self._prefix}"
        else:
            self.url = url.rstrip("/")
            if set(url) & _REFUSED:
                raise StorageUnavailable(
                    f"{url!r} has one of the characters \\ ? # in it", "use a prefix without them"
                )
            self._remote = RemoteStore(scheme, url, self._options, timeout_s)

    @classmethod
    def open(
        cls,
        url: str,
        storage_options: Mapping[str, object] | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        unsafe: bool = False,
    ) -> Root:
        """Open a URL or a plain path; this writes nothing and connects to nothing.

        A call to a remote store is repeated for `timeout_s` seconds, and one more for each MiB.
        `unsafe` admits a store without a conditional create, which bears one writer at most.
        """
        return cls(url, storage_options or {}, timeout_s, unsafe)

    def below(self, name: str) -> Root:
        """The root of a folder below this one."""
        _check_relative(name)
        url = f"{self.url}/{name}"
        return Root(url, self._options, self._timeout_s, self.unsafe)

    def __reduce__(self) -> tuple[Callable[..., Root], tuple[object, ...]]:
        return Root, (self.url, self._options, self._timeout_s, self.unsafe)

    def __repr__(self) -> str:
        return f"Root({self.url!r})"

    def create(self, path: str, data: bytes) -> None:
        """Create one whole object; raise FileExistsError, changing nothing, if it is there.

        On a remote store that object may be this very one, if the first reply was lost.
        """
        _check_relative(path)
        with self._explained("write", path):
            if self.local:
                local_disk.create_exclusive(local_disk.below(self._prefix, path), data)
            else:
                if self.unsafe and self._remote.exists(path):
                    raise FileExistsError(errno.EEXIST, "already stored", path)
                self._remote.create(path, data)

    def replace(self, path: str, data: bytes) -> None:
        """Put a whole object in the place of a damaged one."""
        _check_relative(path)
        with self._explained("replace", path):
            if self.local:
                local_disk.replace(local_disk.below(self._prefix, path), data)
            else:
                self._remote.replace(path, data)

    def read(self, path: str, limit: int) -> bytes:
        """Read one object of at most `limit` bytes; FileNotFoundError if it is absent."""
        _check_relative(path)
        with self._explained("read", path):
            if self.local:
                return local_disk.read_regular(local_disk.below(self._prefix, path), limit)
            return self._remote.read(path, limit)

    def read_ranges(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Bytes start..stop of objects, (path, start, stop), fetched side by side.

        FileNotFoundError if an object is absent, CorruptError if it ends before `stop`.
        """
        for path, _, _ in wanted:
            _check_relative(path)
        if not wanted:
            return []
        with self._explained("read", wanted[0][0]):
            if self.local:
                places = {path: local_disk.below(self._prefix, path) for path, _, _ in wanted}
                found = [local_disk.read_range(places[p], start, stop) for p, start, stop in wanted]
            else:
                found = self._remote.read_ranges(wanted)
        for (path, start, stop), data in zip(wanted, found, strict=True):
            if len(data) != stop - start:
                raise CorruptError(f"{self.url}/{path} ends before byte {stop}")
        return found

    def size(self, path: str) -> int:
        """Bytes of one object; FileNotFoundError if it is absent."""
        _check_relative(path)
        with self._explained("read", path):
            if self.local:
                return local_disk.regular_size(local_disk.below(self._prefix, path))
            return self._remote.size(path)

    def modified(self, path: str) -> float:
        """When an object was last written, seconds since 1970 by the store's own clock."""
        _check_relative(path)
        with self._explained("read", path):
            if self.local:
                return local_disk.modified(local_disk.below(self._prefix, path))
            return self._remote.modified(path)

    def remove(self, path: str) -> None:
        """Delete one object; one that is absent is gone already."""
        _check_relative(path)
        with self._explained("delete", path):
            if self.local:
                local_disk.remove(local_disk.below(self._prefix, path))
            else:
                self._remote.remove(path)

    def names(self, folder: str) -> list[str]:
        """Sorted base names in a folder ("" is the prefix itself), [] if it is absent."""
        return [name for name in self._listing(folder) if not name.endswith(_TEMPORARY)]

    def leftovers(self, folder: str) -> list[str]:
        """Sorted base names of temporary files that an interrupted writer left in a folder."""
        return [name for name in self._listing(folder) if name.endswith(_TEMPORARY)]

    def _listing(self, folder: str) -> list[str]:
        if folder:
            _check_relative(folder)
        try:
            with self._explained("list", folder):
                if self.local:
                    local_disk.check_prefix(self._prefix)
                    return sorted(os.listdir(local_disk.below(self._prefix, folder)))
                return sorted(set(self._remote.names(folder)))
        except FileNotFoundError:
            return []

    @contextlib.contextmanager
    def _explained(self, verb: str, path: str) -> Iterator[None]:
        # Clients of object stores raise types of their own that share no base with OSError.
        caught: type[Exception] = OSError if self.local else Exception
        try:
            yield
        except EsperError:
            raise
        except caught as error:
            expected = FileExistsError if verb == "write" else FileNotFoundError
            if isinstance(error, expected):
                raise
            where = f"{self.url}/{path}".rstrip("/")
            if verb == "list" and isinstance(error, NotADirectoryError):
                raise CorruptError(f"{where} is not a folder") from error
            reason = getattr(error, "strerror", None) or str(error) or _unsaid(error)
            hint = _hint(error) if self.local else _remote_hint(error, self._timeout_s)
            raise StorageUnavailable(f"cannot {verb} {where}: {reason}", hint) from error


def _check_relative(path: str) -> None:
    parts = path.split("/")
    # "?" and "#" are in no name of ours, and some clients read a version of the object into them.
    if set(path) & _REFUSED or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{path!r} is not a path below the storage prefix")


def _unsaid(error: Exception) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__


def _hint(error: Exception) -> str:
    number = getattr(error, "errno", None)
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "check the permissions of this place, or use another URL"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "free some space there, or use another URL"
    if number in (errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK):
        return "this file system has no hard links, which commits need; use another URL"
    return "check that the URL exists and answers"


def _remote_hint(error: Exception, timeout_s: float) -> str:
    failure = classify(error)
    if failure is Failure.DENIED:
        return "check your credentials and their permissions there, or use another URL"
    if failure is Failure.ABSENT:
        return "create this bucket or container, or use another URL"
    if failure is Failure.PASSING:
        return (
            f"it was tried for {timeout_s:g} s: check that the URL and its endpoint answer, "
            "then run the same command again"
        )
    return "check the URL and the options of the storage"
