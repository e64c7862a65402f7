"""LayerActors on threads instead of Ray, each with the concurrency groups that it has there."""

from __future__ import annotations

import asyncio
import inspect
import pickle
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from esper_ray.actors.layer_actor import CONCURRENCY_GROUPS, METHOD_GROUPS, LayerActor
from esper_ray.actors.lifecycle_coordinator import LifecycleCoordinator
from esper_ray.actors.pipeline import ActorPipeline, LocalPipeline
from esper_ray.config import parse_config
from esper_ray.errors import RunFailed
from esper_ray.events.messages import EpochReport, StageReport
from esper_ray.growth import snapshot
from esper_ray.growth.stage import Stage
from esper_ray.planning import RunPlan, plan_run
from esper_ray.storage import Root, RunLog

EPOCHS, EPOCH_STEPS = 6, 2


class ThreadActor:
    """A handle with RemoteActor's calls; arguments and results are copied as Ray copies them."""

    def __init__(self, actor: LayerActor) -> None:
        self.actor = actor
        self._pools = {n: ThreadPoolExecutor(threads) for n, threads in CONCURRENCY_GROUPS.items()}

    def submit(self, method: str, *args: object) -> Future[Any]:
        copied = pickle.loads(pickle.dumps(args))
        pool = self._pools[METHOD_GROUPS[method]]
        return pool.submit(getattr(self.actor, method), *copied)

    def tell(self, method: str, *args: object) -> None:
        self.submit(method, *args)

    async def ask(self, method: str, *args: object) -> Any:
        return await asyncio.wrap_future(self.submit(method, *args))

    def close(self) -> None:
        self.actor.abort("the test is over")
        for pool in self._pools.values():
            pool.shutdown()


class Inbox:
    """A coordinator's handle that keeps what it is told."""

    def __init__(self) -> None:
        self.reports: list[StageReport] = []

    def tell(self, method: str, *args: object) -> None:
        assert method == "ingest"
        self.reports += pickle.loads(pickle.dumps(args))


@pytest.fixture(scope="module")
def plan() -> RunPlan:
    return plan_run(
        parse_config(
            {
                "run": "threads",
                "data": {
                    "args": {"window": 4, "cap_bytes": 60_000},
                    "batch_size": 12,
                    "evaluation_samples": 64,
                },
                "model": {"args": {"window": 4, "embedding": 4, "hidden": 16}},
                "train": {"epochs": EPOCHS, "micro_batches": 3},
                "seeds": {
                    "targets": ["*.hidden"],
                    "epoch_steps": EPOCH_STEPS,
                    "hidden": 4,
                    "warmup_steps": 0,
                    "grafting": {"strategy": "linear", "ramp_epochs": 2},
                },
                "lifecycle": {
                    "germinate_after": 0,
                    "minimum_epochs": {"TRAINING": 1, "GRAFTING": 2, "STABILIZATION": 1},
                    "gates": {"delta_ratio_max": 100.0, "alpha_one_loss_ratio_max": 2.0},
                },
                "storage": {"every_epochs": 4},
            }
        )
    )


@pytest.fixture
def root(request: pytest.FixtureRequest) -> Root:
    return Root.open(f"memory://{request.node.name}/run")


def start(plan: RunPlan, root: Root, timeout_s: float) -> tuple[list[ThreadActor], Inbox]:
    inbox = Inbox()
    actors = [ThreadActor(LayerActor(spec, root, timeout_s)) for spec in plan.stages]
    first, last = actors
    first.actor.setup({"next": last}, inbox, None)
    last.actor.setup({"previous": first}, inbox, None)
    return actors, inbox


@pytest.fixture
def actors_and_inbox(plan: RunPlan, root: Root) -> Iterator[tuple[list[ThreadActor], Inbox]]:
    actors, inbox = start(plan, root, timeout_s=30)
    yield actors, inbox
    for actor in actors:
        actor.close()


async def grow_locally(plan: RunPlan, root: Root) -> tuple[list[EpochReport], list[Stage]]:
    pipeline = LocalPipeline(plan.stages, root, None)
    coordinator = LifecycleCoordinator(plan.coordinator, root)
    await coordinator.setup(pipeline, None, RunLog(root).open_epoch(None))
    reports = []
    for epoch in range(EPOCHS):
        for step in range(epoch * EPOCH_STEPS, (epoch + 1) * EPOCH_STEPS):
            pipeline.run_step(step)
        for report in pipeline.end_epoch(epoch):
            await coordinator.ingest(report)
        reports.append(await coordinator.end_epoch(epoch))
    return reports, pipeline.stages


async def grow_on_threads(
    plan: RunPlan, root: Root, actors: list[ThreadActor], inbox: Inbox
) -> tuple[list[EpochReport], list[Stage]]:
    coordinator = LifecycleCoordinator(plan.coordinator, root)
    pipeline = ActorPipeline(actors, plan.stage_of)
    await coordinator.setup(pipeline, None, RunLog(root).open_epoch(None))
    reports = []
    for epoch in range(EPOCHS):
        steps = range(epoch * EPOCH_STEPS, (epoch + 1) * EPOCH_STEPS)
        running = [actor.submit("run_step", step) for step in steps for actor in actors]
        running += [actor.submit("end_epoch", epoch) for actor in actors]
        for call in running:
            call.result(timeout=60)
        for report in inbox.reports[-len(actors) :]:
            await coordinator.ingest(report)
        reports.append(await coordinator.end_epoch(epoch))
    return reports, [actor.actor._stage for actor in actors]


async def test_actors_train_and_grow_bit_for_bit_as_one_process_does(
    plan: RunPlan, root: Root, actors_and_inbox: tuple[list[ThreadActor], Inbox]
) -> None:
    elsewhere = Root.open(f"{root.url}-reference")
    expected, reference = await grow_locally(plan, elsewhere)
    found, stages = await grow_on_threads(plan, root, *actors_and_inbox)
    assert found == expected
    assert {"TRAINING", "GRAFTING", "STABILIZATION"} <= set(found[-1].states_visited)
    for one, other in zip(stages, reference, strict=True):
        ours, theirs = snapshot.host_tensors(one), snapshot.host_tensors(other)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
        for name, trainer in one.trainers.items():
            bank, same = trainer.layer.bank.tensors(), other.trainers[name].layer.bank.tensors()
            assert all(torch.equal(bank[key], same[key]) for key in bank | same)
    files = [sorted(ref["sha256"] for ref in _newest(r)["segments"]) for r in (root, elsewhere)]
    assert files[0] == files[1]


def _newest(root: Root) -> dict[str, Any]:
    log = RunLog(root)
    return log.read_commit(log.lineage()[0])


async def test_restored_actors_go_on_as_if_nothing_had_happened(
    plan: RunPlan, root: Root, actors_and_inbox: tuple[list[ThreadActor], Inbox]
) -> None:
    from esper_ray.actors.layer_actor import Restore
    from esper_ray.storage import manifest

    _, stages = await grow_on_threads(plan, root, *actors_and_inbox)
    body = _newest(root)
    segments = {ref.name: ref for ref in manifest.segments(body)}
    for spec, stage in zip(plan.stages, stages, strict=True):
        actor = LayerActor(spec, root, 1.0)
        actor.setup({}, Inbox(), Restore(root, segments, body["step"]))
        restored = snapshot.host_tensors(actor._stage)
        expected = snapshot.host_tensors(stage)
        assert all(torch.equal(restored[name], expected[name]) for name in restored | expected)
        assert actor._stage.step == EPOCHS * EPOCH_STEPS


def test_abort_ends_a_step_that_waits_for_its_neighbour(
    actors_and_inbox: tuple[list[ThreadActor], Inbox],
) -> None:
    (_, last), _ = actors_and_inbox
    waiting = last.submit("run_step", 0)
    assert last.submit("ping").result(timeout=10) == 1  # control answers while compute waits
    assert not waiting.done()
    last.tell("abort", "stage 0 is lost")
    with pytest.raises(RunFailed, match="step aborted: stage 0 is lost"):
        waiting.result(timeout=10)


def test_step_whose_neighbour_is_silent_fails_in_time(plan: RunPlan, root: Root) -> None:
    actors, _ = start(plan, root, timeout_s=0.2)
    with pytest.raises(RunFailed, match=r"nothing arrived as \('forward', 0, 0\)"):
        actors[1].submit("run_step", 0).result(timeout=10)
    for actor in actors:
        actor.close()


def test_step_out_of_order_is_refused(actors_and_inbox: tuple[list[ThreadActor], Inbox]) -> None:
    (first, _), _ = actors_and_inbox
    with pytest.raises(RuntimeError, match="at step 0, not 1"):
        first.submit("run_step", 1).result(timeout=10)


def test_single_stage_needs_no_neighbour(plan: RunPlan, root: Root) -> None:
    spec = replace(
        plan.stages[0],
        count=1,
        layers=(),
        factory="tests.models_for_tests:one_stage",
        factory_args={"hidden": 16},
        epoch_steps=1,
    )
    actor, inbox = LayerActor(spec, root, 1.0), Inbox()
    actor.setup({}, inbox, None)
    actor.run_step(0)
    actor.end_epoch(0)
    (report,) = inbox.reports
    assert (report.stage, report.epoch, report.step, len(report.losses)) == (0, 0, 1, 1)


def test_every_method_of_an_actor_has_its_concurrency_group() -> None:
    methods = inspect.getmembers(LayerActor, inspect.isfunction)
    assert {name for name, _ in methods if not name.startswith("_")} == set(METHOD_GROUPS)
    assert set(METHOD_GROUPS.values()) == set(CONCURRENCY_GROUPS)
    assert CONCURRENCY_GROUPS["compute"] == 1  # the only writer of tensors
