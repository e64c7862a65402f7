"""A commit whose segments are stored, and whose events or manifest may not be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from esper_ray.storage import RunLog, SegmentRef


@dataclass(frozen=True, slots=True)
class UnfinishedCommit:
    """What is left to store of commit `seq`: `rows` events, encoded, and the manifest."""

    seq: int
    body: Mapping[str, object]
    segments: Sequence[SegmentRef]
    events: bytes
    rows: int

    def store(self, log: RunLog) -> None:
        """Store events, then the manifest; after a failure the same bytes again."""
        told = log.put_log(self.seq, self.events, self.rows)
        log.commit(self.seq, self.body, self.segments, told)
