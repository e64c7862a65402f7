"""A writer that never gives up, and what must be true of all that it was told is stored."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from esper_ray.errors import StorageUnavailable
from esper_ray.storage import RunLog, manifest

T = TypeVar("T")


def insist(call: Callable[[], T], seconds: float = 60.0) -> T:
    """The result of a call, made again after each StorageUnavailable, as its contract allows."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return call()
        except StorageUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@dataclass
class Writer:
    """Commits to one log; `acknowledged` has the number and the payload's size of each commit."""

    log: RunLog
    seq: int = 0
    acknowledged: dict[int, int] = field(default_factory=dict)

    def start(self) -> None:
        """Open an epoch."""
        self.seq = insist(lambda: self.log.open_epoch(None)).next_seq

    def commit(self, size: int = 20_000) -> None:
        """Store two segments and a part of the log, commit them; return when it is acknowledged."""
        seq, own = self.seq, os.urandom(size)
        refs = [
            insist(lambda: self.log.put_segment("shared", b"shared" * 1000, "arrow")),
            insist(lambda: self.log.put_segment("own", own, "safetensors")),
        ]
        part = insist(lambda: self.log.put_log(seq, own[:1000], rows=1))
        insist(lambda: self.log.commit(seq, {"step": 10 * seq}, refs, part))
        self.acknowledged[seq] = size
        self.seq += 1


def check(writer: Writer, log: RunLog) -> None:
    """Read a writer's run by `log`: nothing lost, nothing doubled, nothing torn, one history."""
    stored = log.commit_numbers()
    assert set(writer.acknowledged) <= set(stored), "an acknowledged commit is lost"
    assert stored == list(range(1, len(stored) + 1)), "a commit is missing or doubled"
    assert len(stored) - len(writer.acknowledged) <= 1  # the one that was cut off, if any
    for seq in stored:
        body = log.read_commit(seq)
        assert (body["seq"], body["step"]) == (seq, 10 * seq)
        _, own = manifest.segments(body)
        assert own.size == writer.acknowledged.get(seq, own.size)
        for ref in manifest.segments(body):
            log.read_segment(ref)  # size and sha256
    assert [seq for seq, _ in log.log_parts()] == stored
    assert log.lineage() == stored[::-1]
