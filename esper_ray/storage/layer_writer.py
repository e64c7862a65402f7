"""What the committing thread does with a group: encode it, merge deltas, publish, remember."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from esper_ray.errors import ConfigError
from esper_ray.storage import compaction, row_codec
from esper_ray.storage.groups import Group, LayerGroup, SeedGroup
from esper_ray.storage.layer_manifest import LayerSegment, Level
from esper_ray.storage.layer_rows import Rows, newest
from esper_ray.storage.layer_segments import read_batches
from esper_ray.storage.recent_groups import RecentGroups
from esper_ray.storage.row_codec import Encoded
from esper_ray.storage.shard_log import Commit, ShardLog

_SEED_BATCH: Final = 64


class LayerWriter:
    """Turns groups into commits of one shard's log; used by one thread."""

    def __init__(self, log: ShardLog) -> None:
        self.log = log
        self.recent = RecentGroups()
        self.needs_all = not log.head.layer_state
        self._whole, self._void = False, False

    def prepare(self, group: Group) -> Commit:
        """The commit of a group; ConfigError where rows are wrong, or not all that are needed."""
        self._whole, self._void = False, False
        try:
            commit, self._whole = self._prepare(group)
        except BaseException:
            # Later changes upon the snapshot that is stored would restore older rows of these.
            self.needs_all |= isinstance(group, LayerGroup)
            raise
        return commit

    def void(self, group: Group) -> Commit:
        """A commit under a group's number that adds nothing."""
        head, self._void = self.log.head, True
        return self.log.prepare(group.seq, head.layer_state, "seed", [], head.step)

    def publish(self, commit: Commit, group: Group) -> None:
        """Store a prepared commit; after StorageUnavailable the same call may be made again."""
        for level in self.log.publish(commit):
            self.needs_all = self.needs_all and not self._whole
            if not self._void:
                group.future.reach(level)
        if isinstance(group, SeedGroup) and not self._void:
            self.recent.keep(group)

    def _prepare(self, group: Group) -> tuple[Commit, bool]:
        """The commit of a group, and whether it stands for the whole shard by itself."""
        log, live = self.log, self.log.head.layer_state
        if isinstance(group, SeedGroup):
            encoded = row_codec.encode(group.rows(), log.schema, _SEED_BATCH)
            return log.prepare(group.seq, live, "seed", encoded, log.head.step), False
        rows, shard = group.collect(), log.shard
        everyone = np.array_equal(np.sort(rows.seed_ids), np.arange(shard.first, shard.stop))
        if not np.isin(rows.seed_ids, np.arange(shard.first, shard.stop)).all():
            raise ConfigError(
                f"rows of seeds that shard {shard.index} does not own",
                f"give each shard its own, here {shard.first} to {shard.stop - 1}",
            )
        if self.needs_all and not everyone:
            raise ConfigError(
                f"the next save of shard {shard.index} must hold all seeds {shard.first} to "
                f"{shard.stop - 1}, since there is no snapshot to which changes could be added"
            )
        encoded = row_codec.encode(rows, log.schema)
        kept, new = ([], encoded) if everyone else self._merged(live, rows, encoded)
        level: Level = "delta" if kept else "full"
        return log.prepare(group.seq, kept, level, new, group.step), not kept

    def _merged(
        self, live: Sequence[LayerSegment], rows: Rows, encoded: list[Encoded]
    ) -> tuple[list[LayerSegment], list[Encoded]]:
        """Segments that stay live beside the changed rows, and what is written for these."""
        chosen = compaction.plan(live, sum(len(one.data) for one in encoded))
        if chosen == "append":
            return list(live), encoded
        kept = [s for s in live if s.level == "full"] if chosen == "merge" else []
        dropped = [s for s in live if s not in kept]
        older = read_batches(self.log.reader.source, dropped, self.log.schema)
        return kept, row_codec.encode(newest([*older, rows]), self.log.schema)
