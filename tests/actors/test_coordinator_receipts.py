"""The coordinator where messages are lost, repeated, late or missing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from esper_ray.actors.protocol import Stamp, Stamped
from esper_ray.errors import RunFailed
from esper_ray.events.log import EventKind
from esper_ray.events.messages import TransitionReceipt
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.lifecycle import Refusal
from esper_ray.storage import Root, RunLog
from tests.actors.coordination import build, logged, report, run_epoch
from tests.builders import telemetry

BORN = telemetry([S.DORMANT] * 2, epochs=1)
GROWING = telemetry([S.GERMINATED] * 2, epochs=1, epoch=1)


async def test_every_batch_has_the_next_number_of_its_layer(root: Root) -> None:
    coordinator, layers, record = await build(root)
    seen = {name: telemetry([S.DORMANT], epochs=1, layer_id=name) for name in "ab"}
    await run_epoch(coordinator, report(0, seen["a"]))
    await run_epoch(coordinator, report(1, *seen.values()))
    assert [(b.layer_id, b.number) for b in layers.batches] == [("a", 1), ("a", 2), ("b", 1)]
    assert layers.stamps == [Stamp(record.run_epoch, 1, b.number) for b in layers.batches]


async def test_receipt_is_acknowledged_and_does_not_come_again(root: Root) -> None:
    coordinator, layers, _ = await build(root)
    await run_epoch(coordinator, report(0, BORN))
    await run_epoch(coordinator, report(1, GROWING))
    assert layers.acknowledged == [("layer", stamp) for stamp in layers.stamps]
    assert len(layers.told) == 2
    assert all(not inbox.outbox for inbox in layers.inboxes.values())


async def test_receipt_whose_acknowledgement_is_lost_is_booked_once(root: Root) -> None:
    coordinator, layers, _ = await build(root, epochs=3)
    layers.lost = 2
    await run_epoch(coordinator, report(0, BORN))
    await run_epoch(coordinator, report(1, GROWING))
    done = await run_epoch(coordinator, report(2, telemetry([S.DORMANT] * 2, epochs=1, epoch=2)))
    assert [told.stamp.number for told in layers.told] == [1, 1, 2, 1, 3]
    assert [stamp.number for _, stamp in layers.acknowledged] == [1, 1, 2, 1, 3]
    assert done.transitions == 6
    assert len(logged(root, EventKind.TRANSITION)) == 6


async def test_refused_batch_is_acknowledged_too(root: Root) -> None:
    coordinator, layers, _ = await build(root)
    layers.refusal = Refusal.STALE_STATE
    await run_epoch(coordinator, report(0, BORN))
    layers.refusal = Refusal.NONE
    done = await run_epoch(coordinator, report(1, BORN))
    assert [stamp.number for _, stamp in layers.acknowledged] == [1, 2]
    assert done.transitions == 2


@pytest.mark.parametrize("name", ["a", "b"])
async def test_silent_layer_fails_the_run_by_its_name(root: Root, name: str) -> None:
    coordinator, layers, _ = await build(root)
    layers.silent = {name}
    seen = [telemetry([S.DORMANT], epochs=1, layer_id=layer) for layer in "ab"]
    with pytest.raises(RunFailed, match=f"layer '{name}' did not answer its transition batch"):
        await run_epoch(coordinator, report(0, *seen))
    assert RunLog(root).commit_numbers() == []


async def test_layer_that_owes_a_receipt_gets_no_further_batch(root: Root) -> None:
    coordinator, layers, _ = await build(root)
    layers.silent = {"layer"}
    with pytest.raises(RunFailed, match="did not answer"):
        await run_epoch(coordinator, report(0, BORN))
    with pytest.raises(RunFailed, match="layer 'layer' has not answered batch 1"):
        await run_epoch(coordinator, report(1, BORN))
    assert len(layers.batches) == 1


async def test_receipt_of_another_run_epoch_is_dropped(root: Root) -> None:
    coordinator, layers, record = await build(root, epochs=1)
    body = TransitionReceipt("layer", 1, 4, np.ones(2, np.bool_), np.zeros(2, np.uint8))
    older = Stamped(Stamp(record.run_epoch - 1, 1, 1), body)
    newer = replace(older, stamp=Stamp(record.run_epoch + 1, 1, 2))
    layers.strays = [older, newer]
    done = await run_epoch(coordinator, report(0, BORN))
    assert done.transitions == 2
    assert layers.acknowledged == [("layer", layers.stamps[0])]
    assert len(logged(root, EventKind.TRANSITION)) == 2


async def test_receipt_of_another_run_epoch_answers_no_batch(root: Root) -> None:
    coordinator, layers, record = await build(root)
    body = TransitionReceipt("layer", 1, 4, np.ones(2, np.bool_), np.zeros(2, np.uint8))
    layers.strays, layers.silent = [Stamped(Stamp(record.run_epoch + 1, 1, 1), body)], {"layer"}
    with pytest.raises(RunFailed, match="layer 'layer' did not answer"):
        await run_epoch(coordinator, report(0, BORN))
