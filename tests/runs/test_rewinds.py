"""A fault takes a run back to its newest commit, and it ends as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from esper_ray.actors import engines
from esper_ray.actors.engines import LocalEngine, Start
from esper_ray.config import RunConfig
from esper_ray.errors import FencedError, RunFailed, StepFailed, StorageUnavailable
from esper_ray.events.log import EventKind
from esper_ray.events.messages import EpochReport, Evaluation
from esper_ray.runtime import Runtime
from esper_ray.storage import RunLog
from tests.runs.history import assert_log_replays, events_of, grow
from tests.runs.test_resume import assert_same_runs

ConfigMaker = Callable[..., RunConfig]
Plan = Mapping[str, Exception]


class Breaking(LocalEngine):
    """Real stages and a real coordinator; a call breaks where `plan` names it, once each."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.opened = dict(plan), list[Start]()

    def open(self, start: Start) -> None:
        self.opened.append(start)
        self._break(f"open {len(self.opened)}")
        super().open(start)

    def train_epoch(self, first_step: int, steps: int) -> None:
        super().train_epoch(first_step, steps - 1)
        self._break(f"train {first_step // steps}")
        super().train_epoch(first_step + steps - 1, 1)

    def end_epoch(self, epoch: int) -> EpochReport:
        self._break(f"before {epoch}")
        report = super().end_epoch(epoch)
        self._break(f"after {epoch}")
        return report

    def evaluate(self, split: str) -> Evaluation:
        self._break("test")
        return super().evaluate(split)

    def _break(self, point: str) -> None:
        if point in self.plan:
            raise self.plan.pop(point)


def run(config: RunConfig, plan: Plan) -> tuple[Breaking, list[str], list[int]]:
    told: list[str] = []
    reported: list[int] = []
    engine = Breaking(plan)
    with Runtime(config, local=True, warn=told.append) as runtime:
        runtime._engine = engine
        runtime.fit("never", on_epoch=lambda report: reported.append(report.epoch))
    return engine, told, reported


def lost(name: str = "an actor is lost") -> StepFailed:
    return StepFailed(name)


def test_a_run_that_breaks_at_every_kind_of_point_ends_bit_for_bit_the_same(
    make_config: ConfigMaker,
) -> None:
    whole, plan, _ = grow(make_config("whole"))
    points = ["train 0", "after 1", "train 3", "open 4", "before 8", "after 9", "train 20", "test"]
    engine, told, reported = run(make_config("broken"), {point: lost() for point in points})
    assert engine.plan == {}
    broken = RunLog(engine.opened[0].root)
    assert_same_runs(whole, broken)
    assert_log_replays(broken, plan)
    assert [start.epoch.run_epoch for start in engine.opened] == list(range(1, len(points) + 2))
    assert reported[:3] == [0, 0, 1]
    assert sum("going on at epoch" in line for line in told) == len(points) - 1  # one broke again
    faults = events_of(broken, EventKind.FAULT).columns
    assert set(faults["cause"]) == {"REWOUND"}
    assert '"verdict":"an actor is lost"' in faults["gate"][0]


def test_faults_without_a_new_commit_between_end_the_run(make_config: ConfigMaker) -> None:
    config = make_config(cluster__max_failures=2)
    with pytest.raises(RunFailed, match="lost: 3 faults without a new checkpoint") as failed:
        run(config, {f"before {epoch}": lost("lost") for epoch in range(3)})
    assert "cluster.max_failures" in failed.value.hint
    spread = {f"after {epoch}": lost() for epoch in (1, 2, 8, 9)}
    assert run(make_config("spread", cluster__max_failures=2), spread)[0].plan == {}


def test_a_store_that_is_away_is_waited_for(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esper_ray.actors.supervision._FIRST_PAUSE_S", 0.01)
    plan: Plan = {"train 1": lost(), "open 2": StorageUnavailable("no answer")}
    engine, told, _ = run(make_config(train__epochs=3), plan)
    assert len(engine.opened) == 3
    assert "waiting for the store: no answer" in told
    with pytest.raises(StorageUnavailable, match="gone"):
        run(
            make_config("gone", cluster__outage_timeout_s=1e-3),
            {"train 1": lost(), "open 2": StorageUnavailable("gone")},
        )


def test_a_number_that_a_zombie_took_is_passed_over_but_another_start_ends_the_run(
    make_config: ConfigMaker,
) -> None:
    engine, _, _ = run(make_config(train__epochs=3), {"before 1": FencedError("commit 1 is taken")})
    assert len(engine.opened) == 2

    class TakenOver(Breaking):
        def halt(self, reason: str) -> None:
            del reason
            RunLog(self.opened[0].root).open_epoch(None)

    with Runtime(make_config("taken", train__epochs=3), local=True) as runtime:
        runtime._engine = TakenOver({"before 1": lost()})
        with pytest.raises(FencedError, match="started again by another writer"):
            runtime.fit("never")


def test_a_run_from_another_place_goes_back_there_until_it_has_a_commit_of_its_own(
    make_config: ConfigMaker,
) -> None:
    log, *_ = grow(make_config("source", train__epochs=7))
    config = make_config("target", train__epochs=16).model_copy(update={"run": "source"})
    engine = Breaking({"before 9": lost()})
    reports: list[Any] = []
    with Runtime(config, local=True) as runtime:
        runtime._engine = engine
        runtime.fit(log.root.url, on_epoch=lambda report: reports.append(report.epoch))
    assert reports[:4] == [7, 8, 7, 8]
    assert [start.epoch.source for start in engine.opened] == [log.root.url] * 2


def test_a_local_engine_is_stopped_at_any_time() -> None:
    engine = engines.LocalEngine()
    engine.halt("nothing is under way")
    engine.close()
