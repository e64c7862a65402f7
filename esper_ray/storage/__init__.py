"""Checkpoint store: URLs, segments, manifests and commits; it sees columns and bytes only."""

from esper_ray.storage.commit_log import EpochRecord, RunLog
from esper_ray.storage.filesystem import Root
from esper_ray.storage.manifest import LogRef, SegmentRef
from esper_ray.storage.run_checkpoints import RunCheckpoints, split_url

__all__ = [
    "EpochRecord",
    "LogRef",
    "Root",
    "RunCheckpoints",
    "RunLog",
    "SegmentRef",
    "split_url",
]
