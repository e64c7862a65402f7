"""Composition root of a run: config in, trained and grown model out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from esper_ray.actors.engines import Engine, LocalEngine, RayEngine, Start
from esper_ray.actors.layer_actor import Restore
from esper_ray.actors.placement import ClusterSettings
from esper_ray.actors.remote import RemoteActor
from esper_ray.actors.run_point import Found, RunResult
from esper_ray.actors.stopping import StopSignal, Wish
from esper_ray.actors.supervision import FaultLimits, Point, Supervisor
from esper_ray.config import RunConfig
from esper_ray.config.signing import signing_key
from esper_ray.errors import ConfigError, CorruptError, FencedError, StepFailed
from esper_ray.events.messages import EpochReport, Evaluation
from esper_ray.lifecycle import move_of
from esper_ray.planning import RunPlan, plan_run
from esper_ray.storage import Mirror, Root, RunCheckpoints, RunLog, manifest, split_url

LN2 = 0.6931471805599453
_PAUSE_S = 0.2


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
            address or cluster.address,
            cluster.wait_for_resources_s,
            cluster.step_timeout_s,
            cluster.answer_timeout_s,
        )
        self._limits = FaultLimits(cluster.max_failures, cluster.outage_timeout_s)
        self._engine: Engine = LocalEngine() if local else RayEngine(settings)
        self.root = Root.open(config.storage_url, **config.storage.access)
        self._key = signing_key(config.storage)
        self._damaged: dict[int, str] = {}
        access = config.storage.replica_access
        replicas = tuple(Root.open(url, **access) for url in config.storage.replicas)
        self._mirror = Mirror(replicas, config.storage.on_upload_error == "warn")
        for root in (self.root, *replicas):
            if root.url.startswith("memory:") and not local:
                raise ConfigError(
                    f"storage.url {root.url!r} is the memory of one process",
                    "give a file or object store URL, or run with --local",
                )
        if config.events.url.startswith("ray:" if local else "memory:"):
            raise ConfigError(
                f"events.bus {config.events.url!r} cannot be reached from where the run is",
                f"give {'memory' if local else 'ray'}://NAME, or none",
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
        """Train to the last epoch; `resume` is `auto`, `never` or a checkpoint's URL.

        After a fault it goes on from the newest commit: epochs since that are reported again.
        """
        began = time.monotonic()
        found = self.open(resume)
        supervisor = Supervisor(self._engine, self._rewind, self._limits, self._warn)
        done, epochs = 0 if found is None else found.point.epoch, self.config.train.epochs
        report, status = None, "completed"
        with StopSignal() as term:
            for report in supervisor.train(done, epochs, self.config.seeds.epoch_steps, term):
                self._tell(report.upload_error, *report.notes)
                on_epoch(report)
                if report.epoch + 1 < epochs and self._halts(report, term):
                    status = "terminated" if term.came else "stopped"
                    break
        scores = self.scores(supervisor.evaluate("test", epochs)) if status == "completed" else {}
        if report is not None and report.commit is not None:
            body = self._log().read_commit(report.commit)
            found = Found.read(self.root, report.commit, body)
        if found is None:
            raise RuntimeError("a run of no epochs has no result")
        point = found.point
        return RunResult(
            run=self.config.run,
            status=status,
            steps=point.step,
            wall_s=round(time.monotonic() - began, 3),
            eval=scores,
            seeds=point.progress.seeds,
            states_visited=tuple(point.progress.states_visited),
            transitions=point.progress.transitions,
            checkpoint=f"{found.root.url}@step={point.step}",
        )

    def _halts(self, report: EpochReport, term: StopSignal) -> bool:
        """Whether the run ends here, where it is stored; holds it for as long as it is paused."""
        wish = Wish(report.wish)
        while wish is Wish.PAUSE and not term.came:
            time.sleep(_PAUSE_S)
            try:
                wish = self._engine.wish()
            except StepFailed:
                return False  # it is dealt with in the next epoch
        return wish is not Wish.RUN or (term.came and report.commit is not None)

    def open(self, resume: str = "never") -> Found | None:
        """Build every part, from the checkpoint that `resume` names; says which it was."""
        self.root.names("")  # a place that cannot be used fails here, before anything starts
        self._tell(self._mirror.check(self._log()))
        self._found = found = self._find(resume)
        self._engine.connect(self.plan.grid.world)
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

    def _log(self) -> RunLog:
        """This run's own log; what is damaged in it is read from the replicas."""
        return RunLog(self.root, key=self._key, replicas=self._mirror.roots)

    def _tell(self, upload_error: str, *notes: str) -> None:
        late = (f"a checkpoint is not stored yet: {upload_error}",) if upload_error else ()
        for line in notes + late:
            self._warn(line)

    def _find(self, resume: str) -> Found | None:
        if resume == "never":
            if older := len(self._log().commit_numbers()):
                self._warn(
                    f"{older} checkpoints of earlier starts at {self.root.url} are set aside"
                )
            return None
        if resume == "auto":
            log = self._log()
            newest = RunCheckpoints(log).newest_valid(self._warn)
            self._damaged = dict(log.sources.report.passed_over)
            if newest is None:
                self._warn(f"nothing is stored at {self.root.url}: starting fresh")
                return None
            return self._checked(Found.read(self.root, *newest), log)
        url, selector = split_url(resume)
        root = Root.open(url, **self.config.storage.access)
        log = self._log() if root.url == self.root.url else RunLog(root, key=self._key)
        seq = (stored := RunCheckpoints(log)).resolve(selector)
        return self._checked(Found.read(root, seq, stored.load(seq)), log)

    def _checked(self, found: Found, log: RunLog) -> Found:
        """Refuse a checkpoint of a run that differs in anything but its length and place."""
        point, url = found.point, found.root.url
        mine: Any = self.plan.coordinator.manifest["config"]  # `auto` by its name
        # An older checkpoint lacks keys that have come since; it was made with their defaults.
        stored = {**RunConfig(run=point.run).identity(), **point.config}
        if differ := [k for k in sorted({*mine, *stored}) if mine.get(k) != stored.get(k)]:
            raise ConfigError(
                f"the checkpoint at {url} was made with another {', '.join(differ[:3])}",
                "restore these keys, or start anew with --resume never and another storage.url",
            )
        if point.step != point.epoch * self.config.seeds.epoch_steps:
            raise CorruptError(
                f"the checkpoint at {url} has step {point.step}, epoch {point.epoch}"
            )
        if point.epoch > self.config.train.epochs:
            raise ConfigError(
                f"the checkpoint is at epoch {point.epoch}, past train.epochs",
                f"set train.epochs to at least {point.epoch}",
            )
        for line in log.sources.report.lines():
            self._warn(line)
        self._warn(f"resuming {url} at step {point.step}")
        return found

    def _rewind(self, fault: str) -> Point:
        """A start from the newest commit of this run's history, or from where it began.

        FencedError where another has started it since.
        """
        log = self._log()
        if log.epoch_numbers()[-1] != self._run_epoch:
            raise FencedError(f"{self.root.url} was started again by another writer")
        newest = RunCheckpoints(log).newest_valid(self._warn)
        found = Found.read(self.root, *newest) if newest else self._found
        return Point(self._start(found, fault), 0 if found is None else found.point.epoch)

    def _start(self, found: Found | None, fault: str = "") -> Start:
        here = found is not None and found.root.url == self.root.url
        log = self._log()
        record = log.open_epoch(
            resumed_from=found.seq if found is not None and here else None,
            source=found.root.url if found is not None and not here else None,
        )
        self._run_epoch = record.run_epoch
        self._tell(self._mirror.follow(log))
        restore = progress = None
        if found is not None:
            segments = {ref.name: ref for ref in manifest.segments(dict(found.body))}
            replicas = self._mirror.roots if here else ()
            restore = Restore(found.root, segments, found.point.step, replicas)
            progress = found.point.coordinator
        return Start(
            stages=self.plan.stages,
            grid=self.plan.grid,
            transport=self.plan.transport,
            coordinator=replace(
                self.plan.coordinator,
                signing_key=self._key,
                mirror=self._mirror,
                herald=replace(self.plan.coordinator.herald, damaged=self._damaged),
            ),
            root=self.root,
            restore=restore,
            progress=progress,
            epoch=record,
            fault=fault,
        )
