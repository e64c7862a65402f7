"""Further roots that get every commit of a run right after the main one has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from esper_ray.errors import ConfigError, CorruptError, StorageUnavailable
from esper_ray.storage import capability
from esper_ray.storage.commit_log import RunLog
from esper_ray.storage.copying import follow
from esper_ray.storage.filesystem import Root
from esper_ray.storage.objects import commit_path, epoch_path
from esper_ray.storage.problems import Problem, damage, in_order, note
from esper_ray.storage.sources import differ
from esper_ray.storage.verification import verify_objects


@dataclass(frozen=True, slots=True)
class Mirror:
    """The replicas of a run. With `errors_pass` one that does not answer is named, and caught up
    with later; without, it ends the run."""

    roots: tuple[Root, ...] = ()
    errors_pass: bool = False

    def follow(self, log: RunLog) -> str:
        """Copy what each replica lacks of a log; why one has not got it, where that may pass."""
        return self._each(lambda root: _catch_up(log, root))

    def check(self, log: RunLog) -> str:
        """Raise CorruptError where a replica has commits that came after all those of the log.

        ConfigError for a replica that is the run's own place.
        """
        return self._each(lambda root: _check_not_ahead(log, root))

    def _each(self, work: Callable[[Root], str]) -> str:
        failures = []
        for root in self.roots:
            try:
                failures.append(work(root))
            except StorageUnavailable as error:
                if not self.errors_pass:
                    raise
                failures.append(f"replica {root.url}: {error}")
        return "; ".join(text for text in failures if text)


def compare(log: RunLog, replica: Root, *, quick: bool = False) -> list[Problem]:
    """Problems of all objects at a replica, and where it differs from the run that it copies."""
    there = RunLog(replica)
    problems = verify_objects(there, quick=quick)
    for number in {*log.epoch_numbers()} & {*there.epoch_numbers()}:
        if differ(log.root, replica, epoch_path(number)):
            problems.append(damage(epoch_path(number), "belongs to another run or history"))
    ours, theirs = {*log.commit_numbers()}, {*there.commit_numbers()}
    problems += [note(commit_path(seq), "is not copied") for seq in ours - theirs]
    lost = [seq for seq in theirs if seq > max(ours, default=0)]
    problems += [damage(commit_path(seq), f"is lost at {log.root.url}") for seq in lost]
    return [{**p, "object": f"{replica.url}/{p['object']}"} for p in in_order(problems)]


def _catch_up(log: RunLog, root: Root) -> str:
    if not RunLog(root).epoch_numbers():
        capability.check_conditional_create(root)
    left = follow(log, root).left_out
    return "; ".join(f"replica {root.url} lacks {seq}: {why}" for seq, why in left.items())


def _check_not_ahead(log: RunLog, root: Root) -> str:
    if root.url == log.root.url:
        raise ConfigError(
            f"storage.replicas has {root.url}, the run's own place", "leave it out, or use another"
        )
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
    return ""
