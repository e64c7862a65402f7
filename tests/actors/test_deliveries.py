"""The coordinator's ledgers: one batch in flight per layer, each receipt booked once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_ray.actors.deliveries import Deliveries
from esper_ray.actors.protocol import Reception, Stamp
from esper_ray.errors import RunFailed


def test_stamps_ascend_for_each_layer_on_its_own() -> None:
    deliveries = Deliveries(run_epoch=7, term=2)
    for number in (1, 2):
        stamp = deliveries.stamp("a")
        assert stamp == Stamp(7, 2, number)
        deliveries.book("a", stamp)
    assert deliveries.stamp("b") == Stamp(7, 2, 1)


def test_layer_gets_no_second_batch_before_it_has_answered_the_first() -> None:
    deliveries = Deliveries(1)
    deliveries.stamp("a")
    with pytest.raises(RunFailed, match="layer 'a' has not answered batch 1"):
        deliveries.stamp("a")
    assert deliveries.stamp("b").number == 1


def test_layers_that_owe_a_receipt_are_named_until_it_is_booked() -> None:
    deliveries = Deliveries(1)
    stamps = {name: deliveries.stamp(name) for name in "abc"}
    deliveries.book("b", stamps["b"])
    assert deliveries.unanswered() == ["a", "c"]
    deliveries.receive("a", stamps["a"])  # looking at a receipt settles nothing
    assert deliveries.unanswered() == ["a", "c"]


def test_receipt_is_new_once_and_known_afterwards() -> None:
    deliveries = Deliveries(1)
    stamp = deliveries.stamp("a")
    assert deliveries.receive("a", stamp) is Reception.NEW
    deliveries.book("a", stamp)
    assert deliveries.receive("a", stamp) is Reception.KNOWN
    assert deliveries.receive("a", deliveries.stamp("a")) is Reception.NEW


@pytest.mark.parametrize("run_epoch", [0, 2])
def test_receipt_of_another_run_epoch_is_none_of_ours(run_epoch: int) -> None:
    deliveries = Deliveries(1)
    stamp = deliveries.stamp("a")
    stray = replace(stamp, run_epoch=run_epoch)
    assert deliveries.receive("a", stray) is Reception.OTHER_RUN_EPOCH
    assert deliveries.unanswered() == ["a"]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=30))
def test_each_batch_is_booked_once_however_often_receipts_come(told: list[int]) -> None:
    deliveries, booked = Deliveries(1), []
    stamps = [deliveries.stamp("a")]
    for number in told:
        stamp = stamps[min(number, len(stamps)) - 1]
        if deliveries.receive("a", stamp) is Reception.NEW:
            deliveries.book("a", stamp)
            booked.append(stamp.number)
            stamps.append(deliveries.stamp("a"))
    assert booked == list(range(1, len(stamps)))
