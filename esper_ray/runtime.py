"""Composition root of a run: config in, trained and grown model out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from esper_ray.actors.engines import Engine, LocalEngine, RayEngine, Start
from esper_ray.actors.layer_actor import Restore
from esper_ray.actors.placement import ClusterSettings
from esper_ray.actors.remote import RemoteActor
from esper_ray.config import RunConfig
from esper_ray.errors import ConfigError
from esper_ray.events.messages import EpochReport, Evaluation
from esper_ray.lifecycle import move_of
from esper_ray.planning import RunPlan, plan_run
from esper_ray.storage import Root, RunCheckpoints, RunLog, manifest, split_url

LN2 = 0.6931471805599453


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a finished run leaves behind; `eval` was measured once, on the test split."""

    run: str
    status: str
    steps: int
    wall_s: float
    eval: Mapping[str, float]
    seeds: Mapping[str, Mapping[str, int]]
    states_visited: tuple[str, ...]
    transitions: int
    checkpoint: str


@dataclass(frozen=True, slots=True)
class Found:
    """A verified commit to start from."""

    root: Root
    seq: int
    body: Mapping[str, Any]


def _ignore(_: object) -> None:
    """Listen to nothing."""


class Runtime:
    """One run; use as a context manager so that actors end with it.

    `warn` gets one line where a damaged checkpoint was passed over or where a run starts fresh.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        local: bool = False,
        address: str | None = None,
        warn: Callable[[str], None] = _ignore,
    ) -> None:
        self.config = config
        self.plan: RunPlan = plan_run(config)
        self._warn = warn
        cluster = config.cluster
        settings = ClusterSettings(
            address or cluster.address, cluster.wait_for_resources_s, cluster.step_timeout_s
        )
        self._engine: Engine = LocalEngine() if local else RayEngine(settings)
        self.root = Root.open(config.storage_url, **config.storage_access)
        if self.root.url.startswith("memory:") and not local:
            raise ConfigError(
                f"storage.url {self.root.url!r} is the memory of one process",
                "give a file or object store URL, or run with --local",
            )

    def __enter__(self) -> Self:
        """The run itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End every actor."""
        self.close()

    @property
    def actors(self) -> Sequence[RemoteActor]:
        """Handles of the LayerActors, in stage order; none in a local run."""
        return self._engine.actors if isinstance(self._engine, RayEngine) else ()

    def close(self) -> None:
        """End every actor, and the cluster if this run started it."""
        self._engine.close()

    def fit(
        self, resume: str = "auto", on_epoch: Callable[[EpochReport], None] = _ignore
    ) -> RunResult:
        """Train to the last epoch; `resume` is `auto`, `never` or a checkpoint's URL."""
        began = time.monotonic()
        found = self.open(resume)
        done = 0 if found is None else int(found.body["epoch"])
        report: EpochReport | None = None
        for epoch in range(done, self.config.train.epochs):
            self.train_epoch(epoch)
            report = self._engine.end_epoch(epoch)
            if report.upload_error:
                self._warn(f"a checkpoint is not stored yet: {report.upload_error}")
            on_epoch(report)
        test = self._engine.evaluate("test")
        root, body = self.root, found.body if found is not None else {}
        if report is not None and report.commit is not None:
            body = RunLog(self.root).read_commit(report.commit)
        elif found is not None:
            root = found.root
        progress = body["coordinator"]
        return RunResult(
            run=self.config.run,
            status="completed",
            steps=int(body["step"]),
            wall_s=round(time.monotonic() - began, 3),
            eval=self.scores(test),
            seeds=progress["seeds"],
            states_visited=tuple(progress["states_visited"]),
            transitions=int(progress["transitions"]),
            checkpoint=f"{root.url}@step={body['step']}",
        )

    def open(self, resume: str = "never") -> Found | None:
        """Build every part, from the checkpoint that `resume` names; says which it was."""
        self.root.names("")  # a place that cannot be used fails here, before anything starts
        found = self._find(resume)
        self._engine.connect(len(self.plan.stages))
        self._engine.open(self._start(found))
        return found

    def train_epoch(self, epoch: int) -> None:
        """The optimiser steps of one epoch, without what follows at its boundary."""
        steps = self.config.seeds.epoch_steps
        self._engine.train_epoch(epoch * steps, steps)

    def request(self, action: str, layer_id: str, seed_ids: Sequence[int]) -> int:
        """Ask for `germinate`, `cancel`, `cull`, `rollback` or `replant` of some seeds.

        It is judged like any other move at the next epoch boundary, whose EpochReport holds an
        answer per seed under the number returned here. ConfigError for an unknown action.
        """
        move_of(action)
        return self._engine.request(action, layer_id, seed_ids)

    def scores(self, evaluation: Evaluation) -> dict[str, float]:
        """An evaluation as named numbers; bits per byte where the data set is text."""
        loss = float(evaluation.loss[0])
        named = {"bits_per_byte": loss / LN2} if self.plan.card.metric == "bits_per_byte" else {}
        return {
            **named,
            "loss": loss,
            "accuracy": float(evaluation.accuracy[0]),
            "samples": evaluation.samples,
        }

    # ---- where a run starts --------------------------------------------------------------------

    def _find(self, resume: str) -> Found | None:
        if resume == "never":
            older = len(RunLog(self.root).commit_numbers())
            if older:
                self._warn(
                    f"{older} checkpoints of earlier starts at {self.root.url} are set aside"
                )
            return None
        if resume == "auto":
            newest = RunCheckpoints(RunLog(self.root)).newest_valid(self._warn)
            if newest is None:
                self._warn(f"nothing is stored at {self.root.url}: starting fresh")
                return None
            return self._checked(Found(self.root, *newest))
        url, selector = split_url(resume)
        root = Root.open(url, **self.config.storage_access)
        stored = RunCheckpoints(RunLog(root))
        seq = stored.resolve(selector)
        return self._checked(Found(root, seq, stored.load(seq)))

    def _checked(self, found: Found) -> Found:
        """Refuse a checkpoint of a run that differs in anything but its length and place."""
        mine, stored = self.config.identity(), found.body["config"]
        differ = [k for k in sorted({*mine, *stored}) if mine.get(k) != stored.get(k)]
        if differ:
            raise ConfigError(
                f"the checkpoint at {found.root.url} was made with another {', '.join(differ[:3])}",
                "restore these keys, or start anew with --resume never and another storage.url",
            )
        if int(found.body["epoch"]) > self.config.train.epochs:
            raise ConfigError(
                f"the checkpoint is at epoch {found.body['epoch']}, past train.epochs",
                f"set train.epochs to at least {found.body['epoch']}",
            )
        self._warn(f"resuming {found.root.url} at step {found.body['step']}")
        return found

    def _start(self, found: Found | None) -> Start:
        here = found is not None and found.root.url == self.root.url
        record = RunLog(self.root).open_epoch(
            resumed_from=found.seq if found is not None and here else None,
            source=found.root.url if found is not None and not here else None,
        )
        restore = progress = None
        if found is not None:
            segments = {ref.name: ref for ref in manifest.segments(dict(found.body))}
            restore = Restore(found.root, segments, int(found.body["step"]))
            progress = found.body["coordinator"]
        return Start(
            stages=self.plan.stages,
            stage_of=self.plan.stage_of,
            coordinator=self.plan.coordinator,
            root=self.root,
            restore=restore,
            progress=progress,
            epoch=record,
        )
