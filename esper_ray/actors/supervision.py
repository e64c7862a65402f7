"""Runs epoch after epoch, and goes back to the newest commit when a part of the run is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from esper_ray.actors.engines import Engine, Start
from esper_ray.errors import FencedError, RunFailed, StepFailed, StorageUnavailable
from esper_ray.events.messages import EpochReport, Evaluation

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0


@dataclass(frozen=True, slots=True)
class FaultLimits:
    """How often in a row, without a new commit between, and how long a run tries to go on."""

    failures: int
    outage_s: float


@dataclass(frozen=True, slots=True)
class Point:
    """Where to go on: `start` is of a new run epoch, `epoch` the first that is to be done."""

    start: Start
    epoch: int


class Supervisor:
    """One run's faults. `newest` opens a new run epoch at the newest commit whenever asked."""

    def __init__(
        self,
        engine: Engine,
        newest: Callable[[str], Point],
        limits: FaultLimits,
        warn: Callable[[str], None],
    ) -> None:
        self._engine, self._newest, self._limits, self._warn = engine, newest, limits, warn
        self._failures = 0

    def train(self, epoch: int, epochs: int, steps: int) -> Iterator[EpochReport]:
        """Do what is left of `epochs` epochs of `steps` optimiser steps each.

        Epochs that a rewind gives up are done, and reported, again.
        """
        while epoch < epochs:
            try:
                self._engine.train_epoch(epoch * steps, steps)
                report = self._engine.end_epoch(epoch)
            except (StepFailed, FencedError) as fault:
                epoch = self._recover(fault)
                continue
            if report.commit is not None:
                self._failures = 0
            yield report
            epoch += 1

    def evaluate(self, split: str, epochs: int) -> Evaluation:
        """The model as it is after `epochs` epochs."""
        while True:
            try:
                return self._engine.evaluate(split)
            except StepFailed as fault:
                if self._recover(fault) < epochs:
                    raise RunFailed(
                        "the last commit of this run is gone", "run the same command again"
                    ) from fault

    def _recover(self, fault: RunFailed | FencedError) -> int:
        """Go back to the newest commit; its epoch. RunFailed after too many faults.

        While the store is away it is asked again, for `outage_s` seconds at most.
        """
        self._count(fault)
        began, pause_s = time.monotonic(), _FIRST_PAUSE_S
        while True:
            self._engine.halt(fault.message)
            try:
                point = self._newest(fault.message)
                self._engine.open(point.start)
            except StepFailed as another:
                fault = another
                self._count(fault)
            except StorageUnavailable as error:
                if time.monotonic() + pause_s > began + self._limits.outage_s:
                    raise
                self._warn(f"waiting for the store: {error.message}")
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                took_s = time.monotonic() - began
                self._warn(f"{fault.message}: going on at epoch {point.epoch} ({took_s:.1f} s)")
                return point.epoch

    def _count(self, fault: RunFailed | FencedError) -> None:
        self._failures += 1
        if self._failures > self._limits.failures:
            raise _given_up(fault, self._failures) from fault


def _given_up(fault: RunFailed | FencedError, failures: int) -> RunFailed | FencedError:
    if isinstance(fault, FencedError):
        return fault
    again = "run the same command again with --resume auto"
    if failures == 1:
        return RunFailed(fault.message, again)
    return RunFailed(
        f"{fault.message}: {failures} faults without a new checkpoint between",
        f"raise cluster.max_failures, lower storage.every_epochs, or {again}",
    )
