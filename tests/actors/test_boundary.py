"""A stage at its step boundaries: what is offered is applied once, receipts stay until logged."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from itertools import pairwise

import pytest

from esper_ray.actors.boundary import StageBoundary, require_taken
from esper_ray.actors.protocol import Answer, Stamp, Stamped
from esper_ray.errors import RunFailed
from esper_ray.events.messages import TransitionBatch
from esper_ray.growth.spec import LayerSpec
from esper_ray.growth.stage import Stage
from esper_ray.lifecycle import Cause, Refusal
from esper_ray.lifecycle import ExtendedLifecycle as S
from tests.builders import PATHS, metrics, stage_spec, transitions

ONE, TWO = "model.0.hidden.0", "model.1.hidden.0"
RUN_EPOCH = 5


@pytest.fixture
def stage() -> Stage:
    """Two layers of four seeds in one stage."""
    layers = tuple(LayerSpec(f"model.{i}.hidden.0", f"{i}.hidden.0", 8, 4) for i in (0, 1))
    return Stage(stage_spec(layers=layers))


@pytest.fixture
def boundary(stage: Stage) -> StageBoundary:
    return StageBoundary(stage, RUN_EPOCH)


def birth(
    number: int, *ids: int, layer: str = ONE, run_epoch: int = RUN_EPOCH
) -> Stamped[TransitionBatch]:
    batch = transitions(
        ids,
        S.DORMANT,
        S.GERMINATED,
        layer_id=layer,
        blueprint_id=0,
        strategy=0,
        number=number,
    )
    return Stamped(Stamp(run_epoch, 1, number), batch)


def states(stage: Stage) -> list[S]:
    return [S(code) for code in stage.trainers[ONE].layer.state.view().state.tolist()]


def moves(stage: Stage, layer: str = ONE) -> list[int]:
    counts: list[int] = stage.trainers[layer].layer.state.host("transition_count").tolist()
    return counts


def test_batch_waits_for_the_boundary(stage: Stage, boundary: StageBoundary) -> None:
    assert boundary.offer(birth(1, 0, 2)) is Answer.ACCEPTED
    assert moves(stage) == [0, 0, 0, 0]
    (receipt,) = boundary.apply([])
    assert moves(stage) == [1, 0, 1, 0]
    assert receipt.stamp == Stamp(RUN_EPOCH, 1, 1)
    assert (receipt.body.layer_id, receipt.body.number, receipt.body.step) == (ONE, 1, 0)
    assert receipt.body.applied.tolist() == [True, True]


def test_nothing_offered_is_no_receipt(boundary: StageBoundary) -> None:
    assert boundary.apply([]) == []


def test_repeated_offer_is_applied_once(stage: Stage, boundary: StageBoundary) -> None:
    batch = birth(1, 0)
    assert boundary.offer(batch) is Answer.ACCEPTED
    assert boundary.offer(batch) is Answer.WAITING
    boundary.apply([])
    assert boundary.offer(batch) is Answer.TAKEN_BEFORE
    boundary.apply([])
    boundary.acknowledge(ONE, batch.stamp)
    assert boundary.offer(batch) is Answer.TAKEN_BEFORE
    assert boundary.apply([]) == []
    assert moves(stage) == [1, 0, 0, 0]


def test_receipt_comes_again_until_it_is_acknowledged(boundary: StageBoundary) -> None:
    boundary.offer(birth(1, 0))
    (receipt,) = boundary.apply([])
    boundary.offer(birth(2, 1))
    again, second = boundary.apply([])
    assert again is receipt
    assert second.stamp.number == 2
    boundary.acknowledge(ONE, receipt.stamp)
    assert boundary.apply([]) == [second]


def test_acknowledgement_may_be_repeated_late_or_of_another_layer(
    boundary: StageBoundary,
) -> None:
    boundary.offer(birth(1, 0))
    (receipt,) = boundary.apply([])
    boundary.acknowledge(TWO, receipt.stamp)
    boundary.acknowledge(ONE, replace(receipt.stamp, run_epoch=4))
    assert boundary.apply([]) == [receipt]
    for _ in range(2):
        boundary.acknowledge(ONE, receipt.stamp)
        assert boundary.apply([]) == []


def test_refused_batch_changes_nothing(stage: Stage, boundary: StageBoundary) -> None:
    assert boundary.offer(birth(1, 0, run_epoch=4)) is Answer.OTHER_RUN_EPOCH
    assert boundary.apply([]) == []
    boundary.offer(birth(1, 0))
    assert boundary.offer(birth(2, 1)) is Answer.BUSY
    boundary.apply([])
    assert states(stage) == [S.GERMINATED, S.DORMANT, S.DORMANT, S.DORMANT]


def test_rows_that_are_no_longer_current_are_refused_in_the_receipt(
    stage: Stage, boundary: StageBoundary
) -> None:
    boundary.offer(birth(1, 0))
    boundary.apply([])
    boundary.offer(birth(2, 0, 1))
    receipt = boundary.apply([])[-1].body
    assert receipt.applied.tolist() == [False, True]
    assert receipt.reason.tolist() == [Refusal.STALE_STATE, Refusal.NONE]
    assert moves(stage) == [1, 1, 0, 0]


def test_layers_of_a_stage_have_boxes_of_their_own(stage: Stage, boundary: StageBoundary) -> None:
    assert boundary.offer(birth(1, 0)) is Answer.ACCEPTED
    assert boundary.offer(birth(1, 3, layer=TWO)) is Answer.ACCEPTED
    assert [r.body.layer_id for r in boundary.apply([])] == [ONE, TWO]
    assert (moves(stage), moves(stage, TWO)) == ([1, 0, 0, 0], [0, 0, 0, 1])


def test_metrics_are_recorded(stage: Stage, boundary: StageBoundary) -> None:
    told = metrics([1], [[0.5, 0.25, 0.0, 0.0]], valid=[0b0011], score=[0.125])
    boundary.apply([replace(told, layer_id=TWO)])
    stored = stage.trainers[TWO].layer.state
    assert stored.host("metrics")[:, 1].tolist() == [0.5, 0.25, 0.0, 0.0]
    assert stage.trainers[ONE].layer.state.host("metrics_valid").tolist() == [0] * 4


def test_metrics_are_recorded_before_moves_are_made(stage: Stage, boundary: StageBoundary) -> None:
    layer = stage.trainers[ONE].layer
    for source, target in pairwise(PATHS[S.CANCELLED]):
        layer.apply_transitions(transitions([1], source, target, blueprint_id=0, strategy=0))
    anew = transitions([1], S.CANCELLED, S.DORMANT, layer_id=ONE, cause=Cause.REPLANT)
    boundary.offer(Stamped(Stamp(RUN_EPOCH, 1, 1), anew))
    told = metrics([1], [[0.5, 0.25, 0.0, 0.0]], valid=[0b0011])
    boundary.apply([replace(told, layer_id=ONE)])
    assert layer.state.host("generation").tolist() == [0, 1, 0, 0]
    assert layer.state.host("metrics_valid").tolist() == [0] * 4  # a new generation has none


def test_offers_from_another_thread_are_each_applied_once(
    stage: Stage, boundary: StageBoundary
) -> None:
    last, over = 50, threading.Event()
    seen: list[int] = []

    def offer_all() -> None:
        for number in range(1, last + 1):
            while boundary.offer(birth(number, 0)) is not Answer.ACCEPTED:
                if over.wait(0.0005):
                    return

    feeder = threading.Thread(target=offer_all, daemon=True)
    feeder.start()
    deadline = time.monotonic() + 30
    while len(seen) < last and time.monotonic() < deadline:
        for receipt in boundary.apply([]):
            seen.append(receipt.stamp.number)
            boundary.acknowledge(ONE, receipt.stamp)
    over.set()
    feeder.join(timeout=10)
    assert seen == list(range(1, last + 1))
    assert moves(stage) == [1, 0, 0, 0]
    assert states(stage) == [S.GERMINATED, S.DORMANT, S.DORMANT, S.DORMANT]


def test_a_batch_that_will_never_be_answered_fails_the_run(boundary: StageBoundary) -> None:
    old = birth(1, 0, run_epoch=RUN_EPOCH - 1)
    with pytest.raises(RunFailed, match=f"layer '{ONE}' refused batch 1: other run epoch"):
        require_taken(old, boundary.offer(old))
    first = birth(1, 0)
    require_taken(first, boundary.offer(first))
    require_taken(first, boundary.offer(first))  # a repeat waits already
    second = birth(2, 1)
    with pytest.raises(RunFailed, match="refused batch 2: busy"):
        require_taken(second, boundary.offer(second))
    boundary.apply([])
    require_taken(first, boundary.offer(first))  # it was taken before
