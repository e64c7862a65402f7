"""What was given up and lives on: neither its messages nor its writes count."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from esper_ray.actors.lifecycle_coordinator import LifecycleCoordinator
from esper_ray.errors import FencedError, StepFailed
from esper_ray.events.log import EventKind
from esper_ray.events.messages import TelemetryBatch
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.storage import Root, RunLog
from tests.actors.coordination import build, logged, report, run_epoch, spec
from tests.builders import telemetry


def seen() -> TelemetryBatch:
    return telemetry([S.DORMANT, S.DORMANT], epochs=5)


async def test_a_zombie_coordinator_commits_nothing(root: Root) -> None:
    zombie, *_ = await build(root, every_epochs=1)
    heir, _, record = await build(root, every_epochs=1)
    assert record.run_epoch == 2
    with pytest.raises(FencedError):
        await run_epoch(zombie, report(0, seen()))
    await run_epoch(heir, report(0, seen()))
    assert RunLog(root).commit_numbers() == [1]
    assert RunLog(root).read_commit(1)["run_epoch"] == 2


async def test_a_zombie_layer_is_not_heard(root: Root) -> None:
    coordinator, _, record = await build(root)
    await coordinator.ingest(report(3, seen()), record.run_epoch - 1)  # later, but of a zombie
    await coordinator.ingest(report(0, seen(), loss=5.0), record.run_epoch)
    assert (await coordinator.end_epoch(0)).losses[0] == 5.0


async def test_a_coordinator_that_is_set_up_again_forgets_all_but_what_people_asked(
    root: Root,
) -> None:
    coordinator, layers, _ = await build(root, every_epochs=1)
    await run_epoch(coordinator, report(0, seen()))
    before = logged(root, EventKind.TRANSITION)
    number = await coordinator.request("germinate", "layer", [7])
    await coordinator.abort()
    again = RunLog(root).open_epoch(None)
    layers.inboxes.clear()
    layers.run_epoch = again.run_epoch
    await coordinator.setup(layers, None, again, "an actor is lost")
    told = await run_epoch(coordinator, report(0, seen()))
    assert [answer.number for answer in told.answers] == [number]
    after = logged(root, EventKind.TRANSITION)
    assert len(after) == len(before) > 0
    assert logged(root, EventKind.FAULT).columns["cause"] == ["REWOUND"]


async def test_another_coordinator_goes_on_where_the_lost_one_stood(root: Root) -> None:
    lost, layers, record = await build(root, every_epochs=3)
    standing = None
    for epoch in range(2):
        await lost.ingest(report(epoch, seen()))
        _, news = await lost.close_epoch(epoch)
        standing = news.after(standing)
    assert standing is not None
    moves = len(layers.batches)
    assert moves > 0
    heir = LifecycleCoordinator(spec(every_epochs=3), root)
    inboxes = {name: inbox.adopt(record.run_epoch, 2)[0] for name, inbox in layers.inboxes.items()}
    layers.inboxes.update(inboxes)
    await heir.take_over(layers, pickle.loads(pickle.dumps(standing)), record, 2, inboxes)
    done = await run_epoch(heir, report(2, seen()))
    assert done.commit == 1
    assert layers.stamps[-1].term == 2
    assert layers.stamps[-1].number == layers.stamps[moves - 1].number + 1
    told = logged(root).columns
    assert told["kind"].tolist().count(EventKind.EPOCH) == 3
    assert (np.diff(told["sequence"].astype(np.int64)) >= 0).all()
    assert logged(root, EventKind.FAULT).columns["cause"] == ["REPLACED"]


async def test_a_layer_that_took_a_batch_nobody_remembers_is_rewound(root: Root) -> None:
    lost, layers, record = await build(root)
    await lost.ingest(report(0, seen()))
    standing = pickle.loads(pickle.dumps((await lost.close_epoch(0))[1]))
    await run_epoch(lost, report(1, seen()))  # it was lost before it could hand this on
    inboxes = {name: inbox.adopt(record.run_epoch, 2)[0] for name, inbox in layers.inboxes.items()}
    heir = LifecycleCoordinator(spec(), root)
    with pytest.raises(StepFailed, match="has gone on without the coordinator"):
        await heir.take_over(layers, standing, record, 2, inboxes)
