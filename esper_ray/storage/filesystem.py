"""One run's prefix on any fsspec file system: objects are created once, and replaced if damaged."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

from fsspec.implementations.dirfs import DirFileSystem

from esper_ray.errors import CorruptError, EsperError, StorageUnavailable
from esper_ray.storage import local_disk
from esper_ray.storage.urls import make_file_system, split_scheme

_CONFLICT_CODES = {"PreconditionFailed", "412"}
_TEMPORARY = ".tmp"
# fsspec's memory store looks first and writes later; threads of one process would both win.
_MEMORY_CREATE = threading.Lock()


class Root:
    """A file system confined to one prefix; it can be pickled and opens again on arrival."""

    def __init__(self, url: str, options: Mapping[str, object], fs: Any, prefix: str) -> None:
        self.url = url
        self.local = url.startswith("file://")
        self._options = dict(options)
        self._prefix = prefix
        self._fs = DirFileSystem(path=prefix, fs=fs)

    @classmethod
    def open(cls, url: str, storage_options: Mapping[str, object] | None = None) -> Root:
        """Open a URL or a plain path; this writes nothing and connects to nothing."""
        options = dict(storage_options or {})
        scheme, rest = split_scheme(url)
        fs = make_file_system(scheme, url, options)
        if scheme == "file":
            prefix = os.path.abspath(os.path.expanduser(rest))
            return cls(f"file://{prefix}", options, fs, prefix)
        prefix = str(fs._strip_protocol(url)).rstrip("/")
        if not prefix:
            raise StorageUnavailable(
                f"{url} names no place to store in", f"add one, as in {scheme}://name/run"
            )
        return cls(url.rstrip("/"), options, fs, prefix)

    def __reduce__(self) -> tuple[Callable[..., Root], tuple[str, dict[str, object]]]:
        return Root.open, (self.url, self._options)

    def __repr__(self) -> str:
        return f"Root({self.url!r})"

    def create(self, path: str, data: bytes) -> None:
        """Create one whole object; raise FileExistsError, changing nothing, if it is there."""
        _check_relative(path)
        with self._explained("write", path):
            if self.local:
                local_disk.create_exclusive(local_disk.below(self._prefix, path), data)
            else:
                self._create_remote(path, data)

    def replace(self, path: str, data: bytes) -> None:
        """Put a whole object in the place of a damaged one."""
        _check_relative(path)
        with self._explained("replace", path):
            if self.local:
                local_disk.replace(local_disk.below(self._prefix, path), data)
            else:
                self._fs.pipe_file(path, data)

    def read(self, path: str, limit: int) -> bytes:
        """Read one object of at most `limit` bytes; FileNotFoundError if it is absent."""
        _check_relative(path)
        with self._explained("read", path):
            if self.local:
                return local_disk.read_regular(local_disk.below(self._prefix, path), limit)
            self._fs.fs.invalidate_cache()
            size = int(self._fs.info(path)["size"])
            if size > limit:
                raise CorruptError(
                    f"{self.url}/{path} has {size} bytes, at most {limit} were expected"
                )
            data = bytes(self._fs.cat_file(path))
        if len(data) != size:
            raise CorruptError(f"{self.url}/{path} gave {len(data)} of {size} bytes")
        return data

    def size(self, path: str) -> int:
        """Bytes of one object; FileNotFoundError if it is absent."""
        _check_relative(path)
        with self._explained("read", path):
            if self.local:
                return local_disk.regular_size(local_disk.below(self._prefix, path))
            self._fs.fs.invalidate_cache()
            return int(self._fs.info(path)["size"])

    def remove(self, path: str) -> None:
        """Delete one object; one that is absent is gone already."""
        _check_relative(path)
        with self._explained("delete", path):
            if self.local:
                local_disk.remove(local_disk.below(self._prefix, path))
            else:
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(path)

    def modified(self, path: str) -> float:
        """When an object was last written, seconds since 1970 by the store's own clock."""
        _check_relative(path)
        with self._explained("read", path):
            if self.local:
                return local_disk.modified(local_disk.below(self._prefix, path))
            self._fs.fs.invalidate_cache()
            changed: datetime = self._fs.modified(path)
            return changed.timestamp()

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
                # Another writer's commits must show: a cached listing would hide them.
                self._fs.fs.invalidate_cache()
                paths: list[str] = self._fs.ls(folder, detail=False)
        except FileNotFoundError:
            return []
        # Object stores may list an empty marker object for the folder itself.
        return sorted({base for path in paths if (base := path.rsplit("/", 1)[-1])})

    def _create_remote(self, path: str, data: bytes) -> None:
        memory = self.url.startswith("memory://")
        try:
            with _MEMORY_CREATE if memory else contextlib.nullcontext():
                self._fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            raise
        except Exception as error:
            # s3fs knows the conflict only by an XML element that some servers leave out.
            if _error_code(error) in _CONFLICT_CODES:
                raise FileExistsError(errno.EEXIST, "already stored", path) from error
            raise

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
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise StorageUnavailable(f"cannot {verb} {where}: {reason}", _hint(error)) from error


def _check_relative(path: str) -> None:
    parts = path.split("/")
    if "\0" in path or "\\" in path or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{path!r} is not a path below the storage prefix")


def _error_code(error: BaseException) -> str:
    for candidate in (error.__cause__, error):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _hint(error: Exception) -> str:
    number = getattr(error, "errno", None)
    if isinstance(error, PermissionError) or number in (errno.EROFS, errno.EACCES):
        return "check the permissions of this place and your credentials, or use another URL"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "free some space there, or use another URL"
    if number in (errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK):
        return "this file system has no hard links, which commits need; use another URL"
    return "check that the URL exists and answers"
