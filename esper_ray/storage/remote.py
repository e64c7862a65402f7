"""An object store behind fsspec: every call has a deadline, is repeated, and renews credentials."""

from __future__ import annotations

import contextlib
import errno
import functools
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from fsspec.asyn import sync
from fsspec.implementations.dirfs import DirFileSystem

from esper_ray.errors import CorruptError, StorageUnavailable
from esper_ray.storage.remote_errors import Failure, classify
from esper_ray.storage.urls import make_file_system

_MODIFIED: Final = ("LastModified", "last_modified", "updated", "mtime", "created")
_ATTEMPTS: Final = 3  # that a call which gets no answer has within its time
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _LEAST_S = 0.05, 2.0, 0.01
_SLOWEST: Final = 1 << 20  # bytes per second that a transfer is given time for
# fsspec's memory store looks first and writes later; threads of one process would both win.
_MEMORY_CREATE = threading.Lock()


class RemoteStore:
    """Objects below one prefix of a store that is no local disk.

    A call takes at most `timeout_s` and a second per MiB; then its last error is raised. A file
    system whose client is not asynchronous (`memory`) is only asked again, not interrupted.
    """

    def __init__(
        self, scheme: str, url: str, options: Mapping[str, object], timeout_s: float
    ) -> None:
        self._url, self._options, self._timeout_s = url.rstrip("/"), dict(options), timeout_s
        self._make = functools.partial(make_file_system, scheme, url)
        self._scheme = scheme
        fs = self._make(self._options)
        self._prefix = str(fs._strip_protocol(url)).rstrip("/")
        if not self._prefix:
            raise StorageUnavailable(
                f"{url} names no place to store in", f"add one, as in {scheme}://name/run"
            )
        self._fs = DirFileSystem(path=self._prefix, fs=fs)

    def create(self, path: str, data: bytes) -> None:
        """Create one object; FileExistsError if it is there, be it by a reply that was lost."""
        # gcsfs states the condition when it begins an upload in parts, not when it ends it.
        whole = {"chunksize": len(data) + 1} if self._scheme in ("gs", "gcs") else {}
        with _MEMORY_CREATE if self._scheme == "memory" else contextlib.nullcontext():
            self._call("pipe_file", path, data, mode="create", size=len(data), **whole)

    def replace(self, path: str, data: bytes) -> None:
        """Put one object, whatever is there."""
        self._call("pipe_file", path, data, size=len(data))

    def read(self, path: str, limit: int) -> bytes:
        """One whole object of at most `limit` bytes."""
        size = self.size(path)
        if size > limit:
            raise CorruptError(
                f"{self._url}/{path} has {size} bytes, at most {limit} were expected"
            )
        data = bytes(self._call("cat_file", path, size=size)) if size else b""
        if len(data) != size:
            raise CorruptError(f"{self._url}/{path} gave {len(data)} of {size} bytes")
        return data

    def read_ranges(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Bytes start..stop of objects, (path, start, stop), fetched side by side."""
        columns = map(list, zip(*wanted, strict=True))
        size = sum(stop - start for _, start, stop in wanted)
        found = self._call("cat_ranges", *columns, on_error="raise", size=size)
        return [bytes(data) for data in found]

    def size(self, path: str) -> int:
        """Bytes of one object; a folder is none."""
        info = self._call("info", path)
        if info.get("type") == "directory":
            raise FileNotFoundError(errno.ENOENT, "a folder, no object", path)
        return int(info["size"])

    def modified(self, path: str) -> float:
        """When an object was last written, seconds since 1970 by the store's own clock."""
        info = self._call("info", path)
        told = next((info[key] for key in _MODIFIED if info.get(key)), None)
        if told is None:
            raise CorruptError(f"{self._url}/{path} has no time of its last change")
        moment = told if isinstance(told, datetime) else datetime.fromisoformat(str(told))
        return moment.timestamp()

    def exists(self, path: str) -> bool:
        """Whether there is such an object."""
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def names(self, folder: str) -> list[str]:
        """Base names in a folder, in no order."""
        paths: list[str] = self._call("ls", folder, detail=False)
        # Object stores may list an empty marker object for the folder itself.
        inside = f"{folder}/" if folder else ""
        return [p.removeprefix(inside) for p in map(_bare, paths) if p not in ("", folder)]

    def remove(self, path: str) -> None:
        """Delete one object; one that is absent is gone already."""
        with contextlib.suppress(FileNotFoundError):
            self._call("rm_file", path)

    # ---- one call ------------------------------------------------------------------------------

    def _call(self, method: str, *args: object, size: int = 0, **kwargs: object) -> Any:
        """The result of a call, repeated while that may help and there is time."""
        extra = size / _SLOWEST
        deadline = time.monotonic() + self._timeout_s + extra
        share, renewed, pause = self._timeout_s / _ATTEMPTS + extra, False, _FIRST_PAUSE_S
        while True:
            left = max(deadline - time.monotonic(), _LEAST_S)
            try:
                return self._attempt(method, args, kwargs, min(share, left))
            except Exception as error:
                failure = classify(error)
                if failure is Failure.CONFLICT and "mode" in kwargs:
                    raise FileExistsError(errno.EEXIST, "already stored", args[0]) from error
                if failure is Failure.ABSENT and not isinstance(error, FileNotFoundError):
                    raise FileNotFoundError(errno.ENOENT, "not stored", args[0]) from error
                if failure is Failure.DENIED and not renewed:
                    renewed = True
                    self._renew()
                    continue
                late = time.monotonic() + pause >= deadline
                if failure is not Failure.PASSING or late:
                    raise
            time.sleep(pause * random.uniform(0.5, 1.0))  # writers that collided part
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _attempt(
        self, method: str, args: Sequence[object], kwargs: Mapping[str, object], timeout_s: float
    ) -> Any:
        fs = self._fs
        fs.fs.invalidate_cache()  # another writer's commits must show
        if fs.fs.async_impl:
            return sync(fs.fs.loop, getattr(fs, f"_{method}"), *args, timeout=timeout_s, **kwargs)
        call: Callable[..., Any] = getattr(fs, method)
        return call(*args, **kwargs)

    def _renew(self) -> None:
        """Make the client anew, so that it reads its credentials again."""
        fs = self._make({**self._options, "skip_instance_cache": True})
        self._fs = DirFileSystem(path=self._prefix, fs=fs)


def _bare(path: str) -> str:
    return path.strip("/")
