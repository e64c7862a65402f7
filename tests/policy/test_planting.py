"""Which dormant seeds are planted, and when."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_ray.errors import ConfigError
from esper_ray.lifecycle import Cause
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.policy import PLANS, Command, PolicySettings
from tests.policy.reports import moves_of, report


def planted(
    states: Sequence[S],
    gradient: Sequence[float],
    room: int = 100,
    epoch: int = 100,
    commands: Mapping[int, Command] | None = None,
) -> list[int]:
    seen = report(states, epoch=epoch, chunk_gradient=np.array(gradient, dtype=np.float32))
    moves = moves_of(seen, PolicySettings(max_growing=room), commands)
    return [seed for seed, tried in moves.items() if tried == [(S.GERMINATED, Cause.POLICY)]]


def test_dormant_seeds_are_planted_by_gradient_and_ties_by_number() -> None:
    gradient = [0.2, 0.5, 0.2, 0.9, 0.5]
    order = [3, 1, 4, 0, 2]
    for room in range(1, 6):
        assert planted([S.DORMANT] * 5, gradient, room) == sorted(order[:room])


def test_lesson_26_a_seed_whose_gradient_was_not_measured_comes_last() -> None:
    gradient = [math.nan, 0.0, 0.1]
    assert planted([S.DORMANT] * 3, gradient, room=1) == [2]
    assert planted([S.DORMANT] * 3, gradient, room=2) == [1, 2]
    assert planted([S.DORMANT] * 3, gradient, room=3) == [0, 1, 2]


def test_where_no_gradient_was_measured_the_first_seeds_are_planted() -> None:
    assert planted([S.DORMANT] * 4, [math.nan] * 4, room=2) == [0, 1]


def test_nothing_is_planted_before_its_time() -> None:
    assert planted([S.DORMANT], [1.0], epoch=99) == []
    assert planted([S.DORMANT], [1.0], epoch=100) == [0]


@pytest.mark.parametrize(("room", "count"), [(1, 0), (4, 0), (5, 1), (6, 2), (99, 3)])
def test_growing_seeds_use_up_the_budget(room: int, count: int) -> None:
    growing = [S.GERMINATED, S.TRAINING, S.GRAFTING, S.EVALUATING]
    ended = [S.FOSSILIZED, S.CULLED, S.ROLLED_BACK]
    states = [*growing, *ended, S.DORMANT, S.DORMANT, S.DORMANT]
    assert planted(states, [0.0] * 10, room) == [7, 8, 9][:count]


@given(states=st.lists(st.sampled_from(list(S)), min_size=1, max_size=20), room=st.integers(1, 10))
def test_planting_never_exceeds_the_room_and_uses_all_of_it(states: list[S], room: int) -> None:
    growing = sum(state in PLANS for state in states)
    dormant = [seed for seed, state in enumerate(states) if state is S.DORMANT]
    chosen = planted(states, [1.0] * len(states), room)
    assert chosen == dormant[: max(room - growing, 0)]


@pytest.mark.parametrize("room", [0, -1])
def test_a_budget_without_room_is_refused(room: int) -> None:
    with pytest.raises(ConfigError, match=f"max_growing must be at least 1, got {room}"):
        PolicySettings(max_growing=room)


def test_a_command_takes_the_place_of_planting() -> None:
    cancel = Command(1, S.CANCELLED, Cause.USER)
    assert planted([S.DORMANT] * 2, [0.5, 0.1], commands={0: cancel}) == [1]
