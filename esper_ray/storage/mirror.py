"""Further roots that get every commit of a run right after the main one has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from esper_ray.errors import CorruptError, StorageUnavailable
from esper_ray.storage import capability
from esper_ray.storage.commit_log import RunLog
from esper_ray.storage.copying import follow
from esper_ray.storage.filesystem import Root


@dataclass(frozen=True, slots=True)
class Mirror:
    """The replicas of a run. With `errors_pass` one that does not answer is told and caught up
    with later; without, it ends the run."""

    roots: tuple[Root, ...] = ()
    errors_pass: bool = False

    def follow(self, log: RunLog) -> str:
        """Copy what each replica lacks of a log; why one has not got it, where that may pass."""
        return self._each(lambda root: _catch_up(log, root))

    def check(self, log: RunLog) -> str:
        """Raise CorruptError where a replica has commits that came after all those of the log."""
        return self._each(lambda root: _check_not_ahead(log, root))

    def _each(self, work: Callable[[Root], None]) -> str:
        failures = []
        for root in self.roots:
            try:
                work(root)
            except StorageUnavailable as error:
                if not self.errors_pass:
                    raise
                failures.append(f"replica {root.url}: {error}")
        return "; ".join(failures)


def _catch_up(log: RunLog, root: Root) -> None:
    if not RunLog(root).epoch_numbers():
        capability.check_conditional_create(root)
    follow(log, root)


def _check_not_ahead(log: RunLog, root: Root) -> None:
    here, there = (max(place.commit_numbers(), default=0) for place in (log, RunLog(root)))
    if there > here:
        has = f"ends with checkpoint {here}" if here else "holds no checkpoint"
        remedy = f"repair {log.root.url} --from {root.url}"
        if not log.epoch_numbers():
            remedy = f"copy {root.url} {log.root.url}"
        raise CorruptError(
            f"{log.root.url} {has}, but its replica {root.url} has {there}: some are lost",
            f"run `esper-ray checkpoints {remedy}`, or name another replica",
        )
