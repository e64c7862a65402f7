"""LayerActors on threads instead of Ray, each with the concurrency groups that it has there."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from esper_ray.actors.grid import Grid
from esper_ray.actors.layer_actor import (
    CONCURRENCY_GROUPS,
    METHOD_GROUPS,
    LayerActor,
    Restore,
    Wiring,
)
from esper_ray.actors.lifecycle_coordinator import LifecycleCoordinator
from esper_ray.actors.pipeline import ActorPipeline, LocalPipeline, homes
from esper_ray.actors.protocol import Answer, Stamp, Stamped
from esper_ray.config import parse_config
from esper_ray.errors import RunFailed
from esper_ray.events.messages import EpochReport, StageReport
from esper_ray.growth import snapshot
from esper_ray.growth.stage import Stage
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.planning import RunPlan, plan_run
from esper_ray.storage import Root, RunLog, manifest
from tests.actors.grids import ThreadActor
from tests.builders import transitions

EPOCHS, EPOCH_STEPS, RUN_EPOCH = 6, 2, 1


class Inbox:
    """A coordinator's handle that keeps what it is told."""

    def __init__(self) -> None:
        self.reports: list[StageReport] = []

    def tell(self, method: str, *args: object) -> None:
        assert method == "ingest"
        report, _ = pickle.loads(pickle.dumps(args))
        self.reports.append(report)


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


def start(
    plan: RunPlan, root: Root, timeout_s: float, kind: type[ThreadActor] = ThreadActor
) -> tuple[list[ThreadActor], Inbox]:
    inbox = Inbox()
    actors = [kind(LayerActor(spec, root, timeout_s)) for spec in plan.stages]
    for rank, thread in enumerate(actors):
        thread.actor.setup(Wiring(plan.grid, rank, actors), inbox, None, RUN_EPOCH)
    return actors, inbox


@pytest.fixture
def actors_and_inbox(plan: RunPlan, root: Root) -> Iterator[tuple[list[ThreadActor], Inbox]]:
    actors, inbox = start(plan, root, timeout_s=30)
    yield actors, inbox
    for actor in actors:
        actor.close()


async def grow_locally(plan: RunPlan, root: Root) -> tuple[list[EpochReport], list[Stage]]:
    pipeline = LocalPipeline(plan.stages, root, None, RUN_EPOCH)
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
    pipeline = ActorPipeline(actors, plan.grid, homes(plan.stages))
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
    _, stages = await grow_on_threads(plan, root, *actors_and_inbox)
    body = _newest(root)
    segments = {ref.name: ref for ref in manifest.segments(body)}
    for spec, stage in zip(plan.stages, stages, strict=True):
        actor = LayerActor(spec, root, 1.0)
        wiring, restore = Wiring(plan.grid, spec.index, []), Restore(root, segments, body["step"])
        actor.setup(wiring, Inbox(), restore, RUN_EPOCH)
        restored = snapshot.host_tensors(actor._stage)
        expected = snapshot.host_tensors(stage)
        assert all(torch.equal(restored[name], expected[name]) for name in restored | expected)
        assert actor._stage.step == EPOCHS * EPOCH_STEPS


# ------------------------------------------------------------------ offers and receipts


def birth(run_epoch: int = RUN_EPOCH, number: int = 1) -> Stamped[Any]:
    batch = transitions(
        [0], S.DORMANT, S.GERMINATED, layer_id="reader.hidden", blueprint_id=0, strategy=0
    )
    return Stamped(Stamp(run_epoch, 1, number), batch)


def test_batch_is_offered_beside_a_step_and_applied_once_after_it(
    actors_and_inbox: tuple[list[ThreadActor], Inbox],
) -> None:
    (first, last), _ = actors_and_inbox
    waiting = first.submit("run_step", 0)  # until its neighbour takes part
    for expected in (Answer.ACCEPTED, Answer.WAITING):
        assert first.submit("offer", birth()).result(timeout=10) is expected
    receipts = first.submit("apply", [])
    assert not waiting.done()
    last.submit("run_step", 0).result(timeout=30)
    (receipt,) = receipts.result(timeout=30)
    assert (receipt.stamp, receipt.body.step) == (birth().stamp, 1)
    assert receipt.body.applied.tolist() == [True]
    assert first.submit("offer", birth()).result(timeout=10) is Answer.TAKEN_BEFORE
    (again,) = first.submit("apply", []).result(timeout=10)
    assert again.stamp == receipt.stamp
    first.submit("acknowledge", "reader.hidden", receipt.stamp).result(timeout=10)
    assert first.submit("apply", []).result(timeout=10) == []
    state = first.actor._stage.trainers["reader.hidden"].layer.state
    assert state.host("transition_count").sum() == 1


def test_batch_of_another_run_epoch_is_refused(
    actors_and_inbox: tuple[list[ThreadActor], Inbox],
) -> None:
    (first, _), _ = actors_and_inbox
    answer = first.submit("offer", birth(run_epoch=RUN_EPOCH + 1)).result(timeout=10)
    assert answer is Answer.OTHER_RUN_EPOCH
    assert first.submit("apply", []).result(timeout=10) == []


class Forgetful(ThreadActor):
    """An actor to which no acknowledgement gets through."""

    def tell(self, method: str, *args: object) -> None:
        if method != "acknowledge":
            super().tell(method, *args)


async def test_run_whose_acknowledgements_are_lost_is_the_same_run(
    plan: RunPlan, root: Root
) -> None:
    expected, _ = await grow_locally(plan, Root.open(f"{root.url}-reference"))
    actors, inbox = start(plan, root, timeout_s=30, kind=Forgetful)
    found, _ = await grow_on_threads(plan, root, actors, inbox)
    assert found == expected
    outbox = [r for actor in actors for r in actor.actor._boundary.apply([])]
    assert len(outbox) == sum(len({layer for layer, *_ in r.moves}) for r in found)
    for actor in actors:
        actor.close()


# ------------------------------------------------------------------ steps


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
    with pytest.raises(RunFailed, match="nothing arrived as forward 0 of step 0 from actor 0"):
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
    actor.setup(Wiring(Grid((1,)), 0, []), inbox, None, RUN_EPOCH)
    actor.run_step(0)
    actor.end_epoch(0)
    (report,) = inbox.reports
    assert (report.stage, report.epoch, report.step, len(report.losses)) == (0, 0, 1, 1)


def test_every_method_of_an_actor_has_its_concurrency_group() -> None:
    methods = inspect.getmembers(LayerActor, inspect.isfunction)
    assert {name for name, _ in methods if not name.startswith("_")} == set(METHOD_GROUPS)
    assert set(METHOD_GROUPS.values()) == set(CONCURRENCY_GROUPS)
    assert CONCURRENCY_GROUPS["compute"] == 1  # the only writer of tensors
