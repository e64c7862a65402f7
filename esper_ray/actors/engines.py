"""Two ways to run the same stages: all in this process, or each in its own Ray actor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from esper_ray.actors.calls import Calls
from esper_ray.actors.coordinator_spec import CoordinatorSpec
from esper_ray.actors.event_hub import open_hub
from esper_ray.actors.grid import Grid
from esper_ray.actors.layer_actor import Restore, Wiring
from esper_ray.actors.lifecycle_coordinator import LifecycleCoordinator
from esper_ray.actors.pipeline import ActorPipeline, LocalPipeline, homes
from esper_ray.actors.placement import Cluster, ClusterSettings
from esper_ray.actors.remote import RemoteActor
from esper_ray.actors.standing import Standing
from esper_ray.actors.stopping import Wish
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
    fault: str = ""
    """What the run goes back for."""

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

    def wish(self, wish: Wish | None = None) -> Wish:
        """Want the run to pause, go on or stop at the next epoch boundary; what holds now."""
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
        spec = replace(start.coordinator, actors=len(start.stages))  # here no stage is split
        self._coordinator = LifecycleCoordinator(spec, start.root)
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

    def wish(self, wish: Wish | None = None) -> Wish:
        """See Engine."""
        return self._runner.run(self._coordinator.wish(wish))

    def close(self) -> None:
        """See Engine."""
        if hasattr(self, "_runner"):
            self._runner.close()


class RayEngine:
    """One LayerActor per stage and a LifecycleCoordinator; this driver holds no tensor."""

    def __init__(self, settings: ClusterSettings) -> None:
        self._cluster = Cluster(settings)
        self._calls = Calls(settings.step_timeout_s, settings.answer_timeout_s)
        patience_s = max(settings.wait_for_resources_s, settings.step_timeout_s)
        self._starting = replace(self._calls, timeout_s=patience_s)
        self._term = 1
        self._standing: Standing | None = None
        self.actors: list[RemoteActor] = []

    def connect(self, stages: int) -> None:
        """Start or join the cluster."""
        self._cluster.connect(stages)

    def open(self, start: Start) -> None:
        """See Engine."""
        self._start, self._standing, self._term = start, None, 1
        self._hub = open_hub(start.coordinator.herald.events, start.root)
        self._place()
        self._set_up(start)
        self._ask("setup", self._pipeline(), start.progress, start.epoch, start.fault)

    def _set_up(self, start: Start) -> None:
        """Have every actor build its stage, and meet the others, as of this run epoch."""
        grid, run_epoch = start.grid, start.epoch.run_epoch
        meeting = None
        if start.transport == "torch_dist":
            asked = self.actors[0].submit("open_store", grid.world, run_epoch)
            [meeting] = self._starting.wait([asked])
        setups = []
        for rank, actor in enumerate(self.actors):
            wiring = Wiring(grid, rank, self.actors, meeting)
            setups.append(
                actor.submit("setup", wiring, self._coordinator, start.restore, run_epoch)
            )
        self._starting.wait(setups)

    def halt(self, reason: str) -> None:
        """See Engine. Survivors are kept, as starting an actor costs seconds."""
        aborts = [(actor, actor.submit("abort", reason)) for actor in self.actors]
        aborts.append((self._coordinator, self._coordinator.submit("abort")))
        alive = self._calls.answering(aborts)
        layers = [actor for actor in alive if actor is not self._coordinator]
        idle = self._calls.answering([(actor, actor.submit("idle")) for actor in layers])
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
            self._calls.wait(asked, self._all)

    def end_epoch(self, epoch: int) -> EpochReport:
        """See Engine."""
        asked = [layer.submit("end_epoch", epoch) for layer in self.actors]
        self._calls.wait(asked, self._all)
        notes = self._heir()
        report: EpochReport
        standing: Standing
        report, standing = self._ask("close_epoch", epoch, watch=True)
        self._standing = standing.after(self._standing)
        return replace(report, notes=(*notes, *report.notes))

    def evaluate(self, split: str) -> Evaluation:
        """See Engine."""
        result: Evaluation = self._ask("evaluate", split, watch=True)
        return result

    def request(self, action: str, layer_id: str, seed_ids: Sequence[int]) -> int:
        """See Engine."""
        return int(self._ask("request", action, layer_id, list(seed_ids)))

    def wish(self, wish: Wish | None = None) -> Wish:
        """See Engine."""
        return Wish(self._ask("wish", wish))

    def most_in_flight(self) -> list[int]:
        """Micro-batches that each actor has kept at once, at most."""
        asked = [actor.submit("most_in_flight") for actor in self.actors]
        return self._calls.wait(asked)

    def close(self) -> None:
        """See Engine."""
        self._cluster.close()

    def _heir(self) -> tuple[str, ...]:
        """Put another in the place of a coordinator that is lost, if it is; says so.

        Between two boundaries the layers and what it last handed on are all that it knew, so no
        step is done again.
        """
        alive = self._calls.answering([(self._coordinator, self._coordinator.submit("ping"))])
        if alive or self._standing is None:
            return ()
        began, epoch = time.monotonic(), self._start.epoch
        self._cluster.drop(self._coordinator)
        self._place()
        self._term += 1
        following = [self._coordinator, epoch.run_epoch, self._term]
        inboxes: dict[str, object] = {}
        for ends in self._calls.wait([a.submit("follow", *following) for a in self.actors]):
            inboxes |= ends
        self._ask("take_over", self._pipeline(), self._standing, epoch, self._term, inboxes)
        self._calls.wait([actor.submit("report") for actor in self.actors])
        took_s = time.monotonic() - began
        return (f"the coordinator is lost: going on with another ({took_s:.1f} s)",)

    def _place(self) -> None:
        start = self._start
        self.actors, self._coordinator = self._cluster.place(
            start.shards, start.coordinator, start.root
        )

    def _pipeline(self) -> ActorPipeline:
        return ActorPipeline(self.actors, self._start.grid, homes(self._start.stages))

    @property
    def _all(self) -> list[RemoteActor]:
        return [*self.actors, self._coordinator]

    def _ask(self, method: str, *args: object, watch: bool = False) -> Any:
        asked = [self._coordinator.submit(method, *args)]
        if watch:
            return self._calls.wait(asked, self._all)[0]
        return self._starting.wait(asked)[0]
