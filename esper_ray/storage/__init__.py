"""Checkpoint store: URLs, segments, manifests and commits; it sees columns and bytes only."""

from esper_ray.storage.acknowledgement import CheckpointId, Durability, SaveFuture
from esper_ray.storage.checkpoint_manager import CheckpointManager
from esper_ray.storage.collection import PruneReport, prune
from esper_ray.storage.commit_log import EpochRecord, RunLog
from esper_ray.storage.copying import CopyReport, copy_commit, copy_run
from esper_ray.storage.filesystem import Root
from esper_ray.storage.layer_manifest import ManifestRef, ShardId
from esper_ray.storage.layer_rows import LayerSchema, Rows
from esper_ray.storage.manifest import LogRef, SegmentRef
from esper_ray.storage.memory_replica import MemoryReplica
from esper_ray.storage.mirror import Mirror, compare
from esper_ray.storage.repair import RepairReport, repair
from esper_ray.storage.replica import Replica, WritableReplica
from esper_ray.storage.retention import Retention
from esper_ray.storage.run_checkpoints import RunCheckpoints, split_url
from esper_ray.storage.signing import SigningKey
from esper_ray.storage.sources import RestoreReport

__all__ = [
    "CheckpointId",
    "CheckpointManager",
    "CopyReport",
    "Durability",
    "EpochRecord",
    "LayerSchema",
    "LogRef",
    "ManifestRef",
    "MemoryReplica",
    "Mirror",
    "PruneReport",
    "RepairReport",
    "Replica",
    "RestoreReport",
    "Retention",
    "Root",
    "Rows",
    "RunCheckpoints",
    "RunLog",
    "SaveFuture",
    "SegmentRef",
    "ShardId",
    "SigningKey",
    "WritableReplica",
    "compare",
    "copy_commit",
    "copy_run",
    "prune",
    "repair",
    "split_url",
]
