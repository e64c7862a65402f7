"""Checkpoint store: URLs, segments, manifests and commits; it sees columns and bytes only."""

from esper_ray.storage.checkpoint_manager import CheckpointManager, split_url
from esper_ray.storage.commit_log import EpochRecord, RunLog
from esper_ray.storage.filesystem import Root
from esper_ray.storage.manifest import LogRef, SegmentRef

__all__ = [
    "CheckpointManager",
    "EpochRecord",
    "LogRef",
    "Root",
    "RunLog",
    "SegmentRef",
    "split_url",
]
