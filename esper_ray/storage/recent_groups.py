"""Rows saved not long ago, kept in memory so that a rollback need not read the store."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final

from esper_ray.storage.groups import SeedGroup
from esper_ray.storage.layer_rows import Rows

RECENT_BYTES: Final = 64 * 2**20


class RecentGroups:
    """The groups committed last, `limit` bytes of rows at most; safe for several threads."""

    def __init__(self, limit: int = RECENT_BYTES) -> None:
        self._limit, self._held = limit, 0
        self._groups: OrderedDict[int, SeedGroup] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, group: SeedGroup) -> None:
        """Keep a group; the oldest ones go when room is short."""
        with self._lock:
            self._groups[group.seq] = group
            self._held += group.held_bytes
            while self._held > self._limit and self._groups:
                self._held -= self._groups.popitem(last=False)[1].held_bytes

    def find(self, seq: int, event_no: int) -> Rows | None:
        """One row, None if its group is not held."""
        with self._lock:
            group = self._groups.get(seq)
        return group.row(event_no) if group is not None and event_no < group.count else None
