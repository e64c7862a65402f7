"""`.pt` files as plain values: checked here, unpickled in a bounded child, checked again here."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from esper_ray.errors import UnsafeInputError
from esper_ray.legacy.archive import check_archive
from esper_ray.legacy.plain import unpack
from esper_ray.storage import codec
from esper_ray.storage.manifest import parse_json

TIMEOUT_S: Final = 60.0
_MAX_JSON = 32 * 2**20
_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "VIRTUAL_ENV", "SYSTEMROOT")
"""What the child gets of our environment: no credentials, no keys."""


class PtLoader:
    """Reads `.pt` bytes, one file after another; use it in a `with` block.

    Its child starts with the first file.
    A child that dies or takes more than `timeout_s` seconds for a file costs that file only.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._child: subprocess.Popen[bytes] | None = None
        self._number = 0

    def __enter__(self) -> Self:
        self._scratch = tempfile.TemporaryDirectory(prefix="esper-import-")
        self._in, self._out = (Path(self._scratch.name) / name for name in ("in", "out"))
        self._in.mkdir()
        self._out.mkdir()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()
        self._scratch.cleanup()

    def load(self, data: bytes) -> Any:
        """The plain value of one file; UnsafeInputError or CorruptError where it is refused."""
        check_archive(data)
        self._number += 1
        number = self._number
        source = self._in / f"{number}.pt"
        source.write_bytes(data)
        try:
            child = self._child or self._begin()
            _, reason, hint = self._ask(child, number)
            if reason is not None:
                raise UnsafeInputError(str(reason), str(hint))
            packed, tensors = (self._out / f"{number}.{end}" for end in ("json", "safetensors"))
            if packed.stat().st_size > _MAX_JSON:
                raise UnsafeInputError(f"it holds more than {_MAX_JSON} bytes of plain values")
            return unpack(
                parse_json(packed.read_bytes()), codec.decode_tensors(tensors.read_bytes())
            )
        finally:
            for path in (source, *self._out.iterdir()):
                path.unlink(missing_ok=True)

    def _begin(self) -> subprocess.Popen[bytes]:
        kept = {k: v for k, v in os.environ.items() if k in _ENVIRONMENT or k.startswith("COV")}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "esper_ray.legacy.unpickling", self._in, self._out],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=kept,
        )
        self._line(self._child)
        return self._child

    def _ask(self, child: subprocess.Popen[bytes], number: int) -> Sequence[Any]:
        assert child.stdin is not None
        try:
            child.stdin.write(f"{number}\n".encode())
            child.stdin.flush()
        except BrokenPipeError:
            self._end()
            raise UnsafeInputError("the process that reads it has ended") from None
        told = json.loads(self._line(child))
        if not isinstance(told, list) or len(told) != 3 or told[0] != number:
            self._end()
            raise UnsafeInputError("the process that reads it answers something else")
        return told

    def _line(self, child: subprocess.Popen[bytes]) -> bytes:
        assert child.stdout is not None
        with selectors.DefaultSelector() as ready:
            ready.register(child.stdout, selectors.EVENT_READ)
            line = child.stdout.readline() if ready.select(self._timeout_s) else None
        if line:
            return line
        self._end()
        if line is None:
            raise UnsafeInputError(f"reading it takes more than {self._timeout_s:g} s")
        raise UnsafeInputError(
            f"the process that reads it ended with {child.returncode}",
            "it asks for more memory or time than an import may take, or it is an attack",
        )

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()
