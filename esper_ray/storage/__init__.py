"""Checkpoint store: URLs, segments, manifests and commits; it sees columns and bytes only."""

from esper_ray.storage.collection import PruneReport, prune
from esper_ray.storage.commit_log import EpochRecord, RunLog
from esper_ray.storage.copying import CopyReport, copy_commit, copy_run
from esper_ray.storage.filesystem import Root
from esper_ray.storage.manifest import LogRef, SegmentRef
from esper_ray.storage.repair import RepairReport, repair
from esper_ray.storage.replica import Replica, RestoreReport
from esper_ray.storage.retention import Retention
from esper_ray.storage.run_checkpoints import RunCheckpoints, split_url

__all__ = [
    "CopyReport",
    "EpochRecord",
    "LogRef",
    "PruneReport",
    "RepairReport",
    "Replica",
    "RestoreReport",
    "Retention",
    "Root",
    "RunCheckpoints",
    "RunLog",
    "SegmentRef",
    "copy_commit",
    "copy_run",
    "prune",
    "repair",
    "split_url",
]
