"""Records: manifests that carry their own digest, in folders where a number names each."""

from __future__ import annotations

import re
import secrets
import socket
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import chain, islice, pairwise
from typing import Any, Final

from esper_ray.errors import CorruptError
from esper_ray.storage import manifest
from esper_ray.storage.filesystem import Root
from esper_ray.storage.replica import Replica

_ROOM: Final = 10**6  # what may still be numbered after a start
_SHOWN: Final = 100


def numbers(root: Root, folder: str, pattern: re.Pattern[str]) -> list[int]:
    """The numbers that name the objects of a folder, in order; other names are left out."""
    names = [name for name in root.names(folder) if pattern.fullmatch(name)]
    return [int(name.partition(".")[0]) for name in names]


def next_number(folder: str, taken: Sequence[int], digits: int = 20) -> int:
    """The number after those of a folder; CorruptError where it would have too many digits.

    Readers would pass over an object of such a name.
    """
    last = max(taken, default=0)
    if last + _ROOM >= 10**digits:
        raise CorruptError(
            f"{folder} holds an object of number {last}, more than any run stores",
            "look at that object and delete it",
        )
    return last + 1


def absent(taken: Sequence[int]) -> Iterator[int]:
    """Numbers from 1 on that are missing before the last one, the first _SHOWN of them."""
    gaps = (range(before + 1, number) for before, number in pairwise([0, *sorted(taken)]))
    return islice(chain.from_iterable(gaps), _SHOWN)


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
