"""Messages are frozen, and a batch of rows can be cut by a mask."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest

from esper_ray import events
from esper_ray.lifecycle import ExtendedLifecycle as S
from tests.builders import metrics, telemetry, transitions

BATCH = transitions(
    [4, 2, 9],
    [0, 1, 2],
    [1, 2, 3],
    generation=[0, 1, 2],
    cause=[0, 1, 2],
    blueprint_id=[5, 6, 7],
    strategy=[1, 0, 1],
    checkpoint_id=[7, 8, 9],
    epoch=3,
    number=11,
)
MESSAGES = [BATCH, metrics([1, 2]), telemetry([S.DORMANT, S.TRAINING])]


def test_take_keeps_whole_rows_in_order() -> None:
    mask = np.array([True, False, True])
    taken = BATCH.take(mask)
    for f in dataclasses.fields(BATCH):
        before, after = getattr(BATCH, f.name), getattr(taken, f.name)
        if isinstance(before, np.ndarray):
            assert after.tolist() == before[mask].tolist(), f.name
            assert after.dtype == before.dtype, f.name
        else:
            assert after == before, f.name


def test_take_nothing_leaves_an_empty_batch() -> None:
    taken = BATCH.take(np.zeros(3, dtype=np.bool_))
    assert len(taken.seed_ids) == len(taken.target) == 0
    assert (taken.layer_id, taken.number, taken.epoch) == ("layer", 11, 3)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_messages_are_frozen(message: events.TransitionBatch) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        message.layer_id = "other"  # type: ignore[misc]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_lesson_44_messages_travel_between_processes_with_every_type(message: object) -> None:
    assert dataclasses.is_dataclass(message)
    again = pickle.loads(pickle.dumps(message))
    for f in dataclasses.fields(message):
        before, after = getattr(message, f.name), getattr(again, f.name)
        assert type(after) is type(before)
        if isinstance(before, np.ndarray):
            assert after.dtype == before.dtype
            np.testing.assert_array_equal(after, before)
        else:
            assert repr(after) == repr(before)  # NaN is not equal to itself


@pytest.mark.parametrize("name", events.__all__)
def test_every_message_is_frozen_and_has_no_room_for_more(name: str) -> None:
    kind = getattr(events, name)
    assert kind.__dataclass_params__.frozen
    assert set(kind.__slots__) == {f.name for f in dataclasses.fields(kind)}
