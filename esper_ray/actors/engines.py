"""Two ways to run the same stages: all in this process, or each in its own Ray actor."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from esper_ray.actors.grid import Grid
from esper_ray.actors.layer_actor import Restore, Wiring
from esper_ray.actors.lifecycle_coordinator import CoordinatorSpec, LifecycleCoordinator
from esper_ray.actors.pipeline import ActorPipeline, LocalPipeline, homes
from esper_ray.actors.placement import Cluster, ClusterSettings
from esper_ray.actors.remote import RemoteActor
from esper_ray.errors import EsperError, RunFailed
from esper_ray.events.messages import EpochReport, Evaluation
from esper_ray.growth.spec import StageSpec
from esper_ray.storage import EpochRecord, Root

_STEPS_IN_FLIGHT = 64


@dataclass(frozen=True, slots=True)
class Start:
    """What an engine is built from; `restore` and `progress` come from a run commit."""

    stages: tuple[StageSpec, ...]
    grid: Grid
    transport: str
    coordinator: CoordinatorSpec
    root: Root
    restore: Restore | None
    progress: Mapping[str, object] | None
    epoch: EpochRecord

    @property
    def shards(self) -> tuple[StageSpec, ...]:
        """What each actor is built from, by its rank."""
        places = map(self.grid.place, range(self.grid.world))
        return tuple(replace(self.stages[stage], shard=shard) for stage, shard in places)


class Engine(Protocol):
    """Trains and decides, epoch by epoch."""

    def connect(self, stages: int) -> None:
        """Reach what the run needs to start; nothing is stored before this has worked."""
        ...

    def open(self, start: Start) -> None:
        """Build and, where asked, restore every part."""
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
        self._runner = asyncio.Runner()
        self._pipeline = LocalPipeline(
            start.stages, start.root, start.restore, start.epoch.run_epoch
        )
        spec = replace(start.coordinator, actors=len(start.stages))  # here no stage is split
        self._coordinator = LifecycleCoordinator(spec, start.root)
        setup = self._coordinator.setup(self._pipeline, start.progress, start.epoch)
        self._runner.run(setup)

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
        self._timeout_s = settings.step_timeout_s
        self.actors: list[RemoteActor] = []

    def connect(self, stages: int) -> None:
        """Start or join the cluster."""
        self._cluster.connect(stages)

    def open(self, start: Start) -> None:
        """See Engine."""
        self.actors, self._coordinator = self._cluster.place(
            start.shards, start.coordinator, start.root
        )
        self._set_up(start)
        pipeline = ActorPipeline(self.actors, start.grid, homes(start.stages))
        self._ask("setup", pipeline, start.progress, start.epoch)

    def _set_up(self, start: Start) -> None:
        """Have every actor build its stage, and meet the others, as of this run epoch."""
        grid, run_epoch = start.grid, start.epoch.run_epoch
        meeting = None
        if start.transport == "torch_dist":
            asked = self.actors[0].submit("open_store", grid.world, run_epoch)
            [meeting] = self._wait([asked])
        self._wait(
            [
                layer.submit(
                    "setup",
                    Wiring(grid, rank, self.actors, meeting),
                    self._coordinator,
                    start.restore,
                    run_epoch,
                )
                for rank, layer in enumerate(self.actors)
            ]
        )

    def train_epoch(self, first_step: int, steps: int) -> None:
        """See Engine. One call per actor and step, a window of them submitted at a time."""
        last = first_step + steps
        for start in range(first_step, last, _STEPS_IN_FLIGHT):
            window = range(start, min(start + _STEPS_IN_FLIGHT, last))
            self._wait([layer.submit("run_step", step) for step in window for layer in self.actors])

    def end_epoch(self, epoch: int) -> EpochReport:
        """See Engine."""
        self._wait([layer.submit("end_epoch", epoch) for layer in self.actors])
        report = self._ask("end_epoch", epoch)
        if not isinstance(report, EpochReport):
            raise TypeError(f"the coordinator answered {type(report).__name__}")
        return report

    def evaluate(self, split: str) -> Evaluation:
        """See Engine."""
        result = self._ask("evaluate", split)
        if not isinstance(result, Evaluation):
            raise TypeError(f"the coordinator answered {type(result).__name__}")
        return result

    def request(self, action: str, layer_id: str, seed_ids: Sequence[int]) -> int:
        """See Engine."""
        return int(str(self._ask("request", action, layer_id, list(seed_ids))))

    def close(self) -> None:
        """See Engine."""
        self._cluster.close()

    def _ask(self, method: str, *args: object) -> object:
        return self._wait([self._coordinator.submit(method, *args)])[0]

    def _wait(self, pending: list[Any]) -> list[Any]:
        """Results in order; the first failure aborts every layer and is raised as its cause."""
        from ray.exceptions import RayError, RayTaskError

        try:
            return self._results(pending)
        except RayTaskError as error:
            self._abort(str(error.cause))
            if isinstance(error.cause, EsperError):
                raise error.cause from None
            raise RunFailed(f"an actor failed: {error.cause!r}") from error
        except RayError as error:
            self._abort(type(error).__name__)
            raise RunFailed(
                f"an actor is lost: {type(error).__name__}",
                "run the same command again with --resume auto",
            ) from error

    def _results(self, pending: list[Any]) -> list[Any]:
        """Wait for all, but not past the first that failed."""
        import ray

        left = pending
        while left:
            done, left = ray.wait(left, num_returns=1, timeout=self._timeout_s)
            if not done:
                self._abort("timed out")
                raise RunFailed(
                    f"no actor answered within {self._timeout_s:.0f} s",
                    "raise cluster.step_timeout_s if a step may take longer",
                )
            ray.get(done)
        return ray.get(pending)

    def _abort(self, reason: str) -> None:
        for layer in self.actors:
            layer.tell("abort", reason)
