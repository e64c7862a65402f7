"""Checkpoint store: URLs, segments, manifests and commits; it sees columns and bytes only."""

from esper_ray.storage.acknowledgement import CheckpointId, Durability, SaveFuture
from esper_ray.storage.checkpoint_manager import CheckpointManager
from esper_ray.storage.collection import PruneReport, prune
from esper_ray.storage.commit_log import EpochRecord, RunLog
from esper_ray.storage.filesystem import Root
from esper_ray.storage.layer_manifest import ManifestRef, ShardId
from esper_ray.storage.layer_rows import LayerSchema, Rows
from esper_ray.storage.manifest import LogRef, SegmentRef
from esper_ray.storage.retention import Retention
from esper_ray.storage.run_checkpoints import RunCheckpoints, split_url
from esper_ray.storage.signing import SigningKey

__all__ = [
    "CheckpointId",
    "CheckpointManager",
    "Durability",
    "EpochRecord",
    "LayerSchema",
    "LogRef",
    "ManifestRef",
    "PruneReport",
    "Retention",
    "Root",
    "Rows",
    "RunCheckpoints",
    "RunLog",
    "SaveFuture",
    "SegmentRef",
    "ShardId",
    "SigningKey",
    "prune",
    "split_url",
]
