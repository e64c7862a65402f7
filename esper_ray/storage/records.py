"""Records: manifests that carry their own digest, in folders where a number names each."""

from __future__ import annotations

import re
import secrets
import socket
from datetime import UTC, datetime
from typing import Any

from esper_ray.errors import CorruptError
from esper_ray.storage import manifest
from esper_ray.storage.filesystem import Root
from esper_ray.storage.replica import Replica


def numbers(root: Root, folder: str, pattern: re.Pattern[str]) -> list[int]:
    """The numbers that name the objects of a folder, in order; other names are left out."""
    names = [name for name in root.names(folder) if pattern.fullmatch(name)]
    return [int(name.partition(".")[0]) for name in names]


def header(kind: str, run_epoch: int) -> dict[str, Any]:
    """What every record carries; the nonce tells it from a twin of equal content."""
    return {
        "format": manifest.FORMAT,
        "min_reader": manifest.READER_VERSION,
        "kind": kind,
        "time": datetime.now(UTC).isoformat(timespec="microseconds"),
        "run_epoch": run_epoch,
        "writer": {
            "run_epoch": run_epoch,
            "nonce": secrets.token_hex(16),
            "host": socket.gethostname(),
        },
    }


def read_manifest(root: Replica, path: str) -> dict[str, Any]:
    """One decoded manifest; FileNotFoundError if absent, CorruptError naming it if damaged."""
    data = root.read(path, manifest.MAX_BYTES)
    try:
        return manifest.decode(data)
    except CorruptError as error:
        raise type(error)(f"{root.url}/{path} is damaged: {error}", error.hint) from error
