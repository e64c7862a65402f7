"""Groups of saves, committed in order by one thread while the next group fills."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from esper_ray.errors import BackpressureError, EsperError, FencedError, StorageUnavailable
from esper_ray.storage.acknowledgement import SaveFuture
from esper_ray.storage.groups import Group, LayerGroup, SeedGroup
from esper_ray.storage.layer_rows import Rows
from esper_ray.storage.seed_record import SeedRow
from esper_ray.storage.shard_log import Commit

# Whatever ends the encoding of a group reaches its future.
_FAILURES = (
    ArithmeticError,
    EsperError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
_BACK_OFF_S = (0.05, 2.0)
_LAST_CALL_S = 0.5


@dataclass(frozen=True, slots=True)
class CommitPolicy:
    """When a group is committed, and how long a store that does not answer is waited for.

    A group closes `interval_s` after its first row, or when it is full; `pending` groups may wait,
    then a save waits up to `timeout_s`, and so does closing. A commit
    that fails is repeated; after `retry_s` its saves
    have failed, which their futures, the next save and `flush` raise.
    """

    interval_s: float = 0.05
    pending: int = 4
    timeout_s: float = 30.0
    retry_s: float = 60.0

    def __post_init__(self) -> None:
        if self.pending < 1 or min(self.interval_s, self.timeout_s, self.retry_s) < 0:
            raise ValueError(f"{self} has a number that cannot be")


class GroupWriter(Protocol):
    """What the thread asks of the log."""

    def prepare(self, group: Group) -> Commit:
        """The commit of a group, encoded; whatever it raises fails the group."""

    def void(self, group: Group) -> Commit:
        """A commit of nothing under the number of a group."""

    def publish(self, commit: Commit, group: Group) -> None:
        """Store a commit; after StorageUnavailable the same call is made again."""


class GroupCommit:
    """A queue of groups and the thread that writes them, one at a time and in order."""

    def __init__(
        self,
        writer: GroupWriter,
        first_seq: int,
        new_group: Callable[[int], SeedGroup],
        policy: CommitPolicy,
    ) -> None:
        self._writer, self._new_group, self._policy = writer, new_group, policy
        self._next_seq = first_seq
        self._queue: deque[Group] = deque()
        self._sealed: set[int] = set()
        self._changed = threading.Condition()
        self._error: Exception | None = None
        self._fatal: FencedError | None = None
        self._closing, self._give_up_at = False, math.inf
        self.counts = dict.fromkeys(("accepted", "groups", "failed", "retries"), 0)
        self._thread = threading.Thread(target=self._run, name="esper-commit", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Groups that are not committed yet."""
        return len(self._queue)

    def add_seed(
        self, seed_id: int, row: SeedRow, timeout: float | None = None
    ) -> tuple[SeedGroup, int]:
        """Copy a row into the open group; its group and event number in it.

        BackpressureError if no group takes it within `timeout` seconds; what failed in the
        background is raised once, FencedError at every call.
        """
        with self._changed:
            group = self._open_group(timeout)
            event_no = group.add(seed_id, row)
            self.counts["accepted"] += 1
            if group.full or group.count == 1:
                self._changed.notify_all()
            return group, event_no

    def add_layer(
        self, step: int, collect: Callable[[], Rows], future: SaveFuture, timeout: float | None
    ) -> LayerGroup:
        """Queue rows of the layer as a group of their own; errors as of `add_seed`."""
        with self._changed:
            self._make_room(timeout)
            self._seal()
            group = LayerGroup(self._take_seq(), step, collect, future)
            self._queue.append(group)
            self.counts["accepted"] += 1
            self._changed.notify_all()
            return group

    def flush(self) -> list[SaveFuture]:
        """Close the open group; the futures of all that is not committed yet, oldest first."""
        with self._changed:
            self._raise_failure()
            self._seal()
            self._changed.notify_all()
            return [group.future for group in self._queue]

    def raise_failure(self) -> None:
        """Raise what failed in the background since the last call, if anything did."""
        with self._changed:
            self._raise_failure()

    def find(self, seq: int, event_no: int) -> Rows | None:
        """A row that is accepted and not committed yet."""
        with self._changed:
            for group in self._queue:
                if group.seq == seq and isinstance(group, SeedGroup) and event_no < group.count:
                    return group.row(event_no)
        return None

    def close(self, timeout: float) -> bool:
        """Commit what is queued, up to `timeout` seconds; whether the thread has ended."""
        with self._changed:
            self._closing = True
            self._give_up_at = min(self._give_up_at, time.monotonic() + timeout)
            self._seal()
            self._changed.notify_all()
        self._thread.join(timeout + _LAST_CALL_S)
        return not self._thread.is_alive()

    # ---- under the lock --------------------------------------------------------------------------

    def _open_group(self, timeout: float | None) -> SeedGroup:
        self._raise_failure()
        last = self._queue[-1] if self._queue else None
        if isinstance(last, SeedGroup) and last.seq not in self._sealed and not last.full:
            return last
        self._make_room(timeout)
        self._seal()
        group = self._new_group(self._take_seq())
        self._queue.append(group)
        return group

    def _make_room(self, timeout: float | None) -> None:
        limit = self._policy.timeout_s if timeout is None else timeout
        room = self._changed.wait_for(
            lambda: self._closing or self._fatal or len(self._queue) < self._policy.pending, limit
        )
        self._raise_failure()
        if self._closing:
            raise StorageUnavailable("this checkpoint manager is closed", "open a new one")
        if not room:
            raise BackpressureError(
                f"{len(self._queue)} groups of checkpoints wait for the store, none was stored "
                f"within {limit} s",
                "save less often, use a faster store, or look whether it answers",
            )

    def _raise_failure(self) -> None:
        if self._fatal is not None:
            raise self._fatal
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _seal(self) -> None:
        self._sealed.update(group.seq for group in self._queue)

    def _take_seq(self) -> int:
        self._next_seq += 1
        return self._next_seq - 1

    # ---- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        while (group := self._next()) is not None:
            error = self._publish(group, self._prepared(group))
            with self._changed:
                if error is None:
                    self._queue.popleft()
                    self._sealed.discard(group.seq)
                    self.counts["groups"] += 1
                else:
                    self._abandon(error)
                self._changed.notify_all()

    def _next(self) -> Group | None:
        """The oldest group once it is due; None when all is written and this is closed."""
        with self._changed:
            while True:
                if not self._queue:
                    if self._closing:
                        return None
                    self._changed.wait()
                    continue
                group = self._queue[0]
                left = group.opened_at + self._policy.interval_s - time.monotonic()
                if group.full or group.seq in self._sealed or left <= 0:
                    self._sealed.add(group.seq)
                    return group
                self._changed.wait(left)

    def _prepared(self, group: Group) -> Commit:
        """The commit of a group; an empty one where it cannot be made, so that no number is left.

        A gap would let a replaced writer and its heir both create the number after it.
        """
        try:
            return self._writer.prepare(group)
        except _FAILURES as error:
            self._fail(group, error)
            return self._writer.void(group)

    def _publish(self, group: Group, commit: Commit) -> EsperError | None:
        """Store a commit, however long it takes; an error only where it is given up.

        After `retry_s` the save has failed for its caller, but it stays first in the queue: what
        follows is built upon it, and whether it was stored after all is not known.
        """
        deadline = time.monotonic() + self._policy.retry_s
        pause, longest = _BACK_OFF_S
        while True:
            try:
                self._writer.publish(commit, group)
            except FencedError as error:
                return error
            except EsperError as error:
                now = time.monotonic()
                if now >= self._give_up_at:
                    return error
                if now + pause > deadline:
                    deadline = math.inf
                    self._fail(group, error)
            else:
                return None
            self.counts["retries"] += 1
            time.sleep(min(pause, max(0.0, self._give_up_at - time.monotonic())))
            pause = min(2 * pause, longest)

    def _fail(self, group: Group, error: Exception) -> None:
        with self._changed:
            self._error = error
            self.counts["failed"] += 1
            self._changed.notify_all()
        group.future.fail(error)

    def _abandon(self, error: EsperError) -> None:
        """Give up all that waits: another writer has the shard, or this one is closed."""
        if isinstance(error, FencedError):
            self._fatal = error
        self._error = error
        for group in self._queue:
            if group.future.exception() is None:
                self.counts["failed"] += 1
                group.future.fail(error)
        self._queue.clear()
