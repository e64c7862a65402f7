"""Two ways to run the same stages: all in this process, or each in its own Ray actor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from esper_ray.actors.layer_actor import Restore
from esper_ray.actors.lifecycle_coordinator import CoordinatorSpec, LifecycleCoordinator
from esper_ray.actors.pipeline import ActorPipeline, LocalPipeline
from esper_ray.actors.placement import Cluster, ClusterSettings
from esper_ray.actors.remote import RemoteActor
from esper_ray.errors import EsperError, RunFailed, StepFailed
from esper_ray.events.messages import EpochReport, Evaluation
from esper_ray.growth.spec import StageSpec
from esper_ray.storage import EpochRecord, Root

_STEPS_IN_FLIGHT = 64


@dataclass(frozen=True, slots=True)
class Start:
    """What an engine is built from; `restore` and `progress` come from a run commit."""

    stages: tuple[StageSpec, ...]
    stage_of: Mapping[str, int]
    coordinator: CoordinatorSpec
    root: Root
    restore: Restore | None
    progress: Mapping[str, object] | None
    epoch: EpochRecord
    fault: str = ""
    """What the run goes back for."""


class Engine(Protocol):
    """Trains and decides, epoch by epoch."""

    def connect(self, stages: int) -> None:
        """Reach what the run needs to start; nothing is stored before this has worked."""
        ...

    def open(self, start: Start) -> None:
        """Build and, where asked, restore every part; after `halt` once more."""
        ...

    def halt(self, reason: str) -> None:
        """Stop every part; what does not answer is ended, and built anew by `open`."""
        ...

    def train_epoch(self, first_step: int, steps: int) -> None:
        """Run optimiser steps first_step .. first_step + steps - 1."""
        ...

    def end_epoch(self, epoch: int) -> EpochReport:
        """Let seeds grow older, judge, decide, apply, commit."""
        ...

    def evaluate(self, split: str) -> Evaluation:
        """The model as it is on one split."""
        ...

    def request(self, action: str, layer_id: str, seed_ids: Sequence[int]) -> int:
        """Ask for a change of some seeds at the next epoch boundary; its number."""
        ...

    def close(self) -> None:
        """Free everything; safe to call at any time."""
        ...


class LocalEngine:
    """Everything in this process, one stage after the other, without Ray."""

    def connect(self, stages: int) -> None:
        """Nothing to reach."""
        del stages

    def open(self, start: Start) -> None:
        """See Engine."""
        self.close()
        self._runner = asyncio.Runner()
        self._pipeline = LocalPipeline(
            start.stages, start.root, start.restore, start.epoch.run_epoch
        )
        self._coordinator = LifecycleCoordinator(start.coordinator, start.root)
        setup = self._coordinator.setup(self._pipeline, start.progress, start.epoch, start.fault)
        self._runner.run(setup)

    def halt(self, reason: str) -> None:
        """Nothing is under way between two calls."""
        del reason

    def train_epoch(self, first_step: int, steps: int) -> None:
        """See Engine."""
        for step in range(first_step, first_step + steps):
            self._pipeline.run_step(step)

    def end_epoch(self, epoch: int) -> EpochReport:
        """See Engine."""
        for report in self._pipeline.end_epoch(epoch):
            self._runner.run(self._coordinator.ingest(report))
        return self._runner.run(self._coordinator.end_epoch(epoch))

    def evaluate(self, split: str) -> Evaluation:
        """See Engine."""
        return self._runner.run(self._coordinator.evaluate(split))

    def request(self, action: str, layer_id: str, seed_ids: Sequence[int]) -> int:
        """See Engine."""
        return self._runner.run(self._coordinator.request(action, layer_id, seed_ids))

    def close(self) -> None:
        """See Engine."""
        if hasattr(self, "_runner"):
            self._runner.close()


class RayEngine:
    """One LayerActor per stage and a LifecycleCoordinator; this driver holds no tensor."""

    def __init__(self, settings: ClusterSettings) -> None:
        self._cluster = Cluster(settings)
        self._timeout_s, self._answer_s = settings.step_timeout_s, settings.answer_timeout_s
        self.actors: list[RemoteActor] = []

    def connect(self, stages: int) -> None:
        """Start or join the cluster."""
        self._cluster.connect(stages)

    def open(self, start: Start) -> None:
        """See Engine."""
        self.actors, self._coordinator = self._cluster.place(
            start.stages, start.coordinator, start.root
        )
        self._set_up(start)
        pipeline = ActorPipeline(self.actors, start.stage_of)
        self._ask("setup", pipeline, start.progress, start.epoch, start.fault)

    def _set_up(self, start: Start) -> None:
        """Have every actor build its stage, and meet the others, as of this run epoch."""
        last, run_epoch = len(self.actors) - 1, start.epoch.run_epoch
        setups = []
        for index, layer in enumerate(self.actors):
            peers: dict[str, RemoteActor] = {}
            if index > 0:
                peers["previous"] = self.actors[index - 1]
            if index < last:
                peers["next"] = self.actors[index + 1]
            setups.append(layer.submit("setup", peers, self._coordinator, start.restore, run_epoch))
        self._wait(setups)

    def halt(self, reason: str) -> None:
        """See Engine. Survivors are kept, as starting an actor costs seconds."""
        aborts = [(actor, actor.submit("abort", reason)) for actor in self.actors]
        aborts.append((self._coordinator, self._coordinator.submit("abort")))
        alive = self._answering(aborts)
        layers = [actor for actor in alive if actor is not self._coordinator]
        idle = self._answering([(actor, actor.submit("idle")) for actor in layers])
        kept = [actor for actor in alive if actor is self._coordinator] + idle
        for actor, _ in aborts:
            if not any(actor is each for each in kept):
                self._cluster.drop(actor)

    def train_epoch(self, first_step: int, steps: int) -> None:
        """See Engine. One call per actor and step, a window of them submitted at a time."""
        last = first_step + steps
        for start in range(first_step, last, _STEPS_IN_FLIGHT):
            window = range(start, min(start + _STEPS_IN_FLIGHT, last))
            asked = [layer.submit("run_step", step) for step in window for layer in self.actors]
            self._wait(asked, watch=True)

    def end_epoch(self, epoch: int) -> EpochReport:
        """See Engine."""
        self._wait([layer.submit("end_epoch", epoch) for layer in self.actors], watch=True)
        report = self._ask("end_epoch", epoch, watch=True)
        if not isinstance(report, EpochReport):
            raise TypeError(f"the coordinator answered {type(report).__name__}")
        return report

    def evaluate(self, split: str) -> Evaluation:
        """See Engine."""
        result = self._ask("evaluate", split, watch=True)
        if not isinstance(result, Evaluation):
            raise TypeError(f"the coordinator answered {type(result).__name__}")
        return result

    def request(self, action: str, layer_id: str, seed_ids: Sequence[int]) -> int:
        """See Engine."""
        return int(str(self._ask("request", action, layer_id, list(seed_ids))))

    def close(self) -> None:
        """See Engine."""
        self._cluster.close()

    def _ask(self, method: str, *args: object, watch: bool = False) -> object:
        return self._wait([self._coordinator.submit(method, *args)], watch=watch)[0]

    def _wait(self, pending: list[Any], *, watch: bool = False) -> list[Any]:
        """Results in order, or the first failure: StepFailed where an actor is lost or hangs.

        Actors that are all set up can be watched: one that does not even answer is found sooner.
        """
        from ray.exceptions import RayError, RayTaskError

        try:
            return self._results(pending, watch)
        except RayTaskError as error:
            if isinstance(error.cause, EsperError):
                raise error.cause from None
            if isinstance(error.cause, RayError):
                raise _lost(error.cause) from error
            raise RunFailed(f"an actor failed: {error.cause!r}") from error
        except RayError as error:
            raise _lost(error) from error

    def _results(self, pending: list[Any], watch: bool) -> list[Any]:
        """Wait for all, but not past the first that failed."""
        import ray

        left, heard = pending, time.monotonic()
        while left:
            patience_s = heard + self._timeout_s - time.monotonic()
            look_s = min(patience_s, self._answer_s) if watch else patience_s
            done, left = ray.wait(left, num_returns=1, timeout=max(0.0, look_s))
            if done:
                ray.get(done)
                heard = time.monotonic()
            elif look_s >= patience_s:
                raise StepFailed(
                    f"no step ended within {self._timeout_s:.0f} s",
                    "raise cluster.step_timeout_s if a step may take longer",
                )
            else:
                self._check_answers()
        return ray.get(pending)

    def _check_answers(self) -> None:
        """StepFailed where an actor does not answer, whatever it is at."""
        parts = [*self.actors, self._coordinator]
        alive = self._answering([(actor, actor.submit("ping")) for actor in parts])
        if silent := [n for n, actor in enumerate(parts) if not any(actor is a for a in alive)]:
            name = "the coordinator" if silent[0] == len(self.actors) else f"actor {silent[0]}"
            raise StepFailed(f"{name} does not answer within {self._answer_s:.0f} s")

    def _answering(self, asked: list[tuple[RemoteActor, Any]]) -> list[RemoteActor]:
        """The actors that answer within `answer_timeout_s`."""
        import ray
        from ray.exceptions import RayError

        deadline, alive = time.monotonic() + self._answer_s, []
        for actor, answer in asked:
            try:
                ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
            except RayError:
                continue
            alive.append(actor)
        return alive


def _lost(error: Exception) -> StepFailed:
    return StepFailed(
        f"an actor is lost: {type(error).__name__}", "run the same command again with --resume auto"
    )
