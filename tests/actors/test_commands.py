"""Requests of people: one answer for each seed of each, whatever becomes of it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_ray.actors.commands import Commands
from esper_ray.errors import ConfigError
from esper_ray.events.messages import Answer
from esper_ray.lifecycle import ACTIONS, Cause, Refusal
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.policy import Command
from tests.builders import telemetry

SEEN = {name: telemetry([S.TRAINING] * 3, layer_id=name) for name in ("a", "b")}


def settle(commands: Commands, layer: str, reasons: dict[int, Refusal]) -> None:
    commands.settle(
        layer,
        np.array(list(reasons), dtype=np.int64),
        np.array(list(reasons.values()), dtype=np.uint8),
    )


def test_requests_wait_until_they_are_taken_and_are_taken_once() -> None:
    commands = Commands()
    first = commands.add("cull", "a", [2, 0])
    second = commands.add("replant", "b", [1])
    assert (first, second) == (1, 2)
    assert commands.answered() == ()
    assert commands.take(SEEN) == {
        "a": {2: Command(1, S.CULLED, Cause.USER), 0: Command(1, S.CULLED, Cause.USER)},
        "b": {1: Command(2, S.DORMANT, Cause.REPLANT)},
    }
    assert commands.take(SEEN) == {"a": {}, "b": {}}


def test_what_is_not_refused_was_done() -> None:
    commands = Commands()
    commands.add("cull", "a", [0, 1, 2])
    commands.take(SEEN)
    settle(commands, "a", {0: Refusal.NONE, 1: Refusal.TOO_EARLY, 2: Refusal.NONE})
    settle(commands, "a", {0: Refusal.NONE, 2: Refusal.STALE_STATE})  # what the layer says
    refusals = [(answer.seed_id, answer.refusal) for answer in commands.answered()]
    assert refusals == [(0, Refusal.NONE), (1, Refusal.TOO_EARLY), (2, Refusal.STALE_STATE)]


def test_rows_that_nobody_asked_for_are_passed_over() -> None:
    commands = Commands()
    settle(commands, "a", {0: Refusal.GATE})
    commands.add("cull", "a", [0])
    commands.take(SEEN)
    settle(commands, "a", {1: Refusal.GATE})
    settle(commands, "b", {0: Refusal.GATE})
    assert commands.answered() == (Answer(1, "cull", "a", 0, Refusal.NONE),)


@pytest.mark.parametrize(("layer", "seed"), [("c", 0), ("a", 3), ("a", -1), ("", 0)])
def test_what_names_no_seed_is_refused_and_commands_nothing(layer: str, seed: int) -> None:
    commands = Commands()
    commands.add("cull", layer, [seed])
    assert commands.take(SEEN) == {"a": {}, "b": {}}
    assert commands.answered() == (Answer(1, "cull", layer, seed, Refusal.UNKNOWN_SEED),)


def test_second_request_for_a_seed_is_refused() -> None:
    commands = Commands()
    commands.add("cull", "a", [1])
    commands.add("cancel", "a", [1])
    assert commands.take(SEEN)["a"] == {1: Command(1, S.CULLED, Cause.USER)}
    settle(commands, "a", {1: Refusal.GATE})
    assert [(a.number, a.action, a.refusal) for a in commands.answered()] == [
        (1, "cull", Refusal.GATE),
        (2, "cancel", Refusal.DUPLICATE_SEED),
    ]


def test_unknown_action_is_a_config_error_and_waits_for_nothing() -> None:
    commands = Commands()
    with pytest.raises(ConfigError, match="'water'") as error:
        commands.add("water", "a", [0])
    assert "germinate" in error.value.hint
    assert commands.take(SEEN) == {"a": {}, "b": {}}
    assert commands.add("cull", "a", [0]) == 1


ASKED = st.tuples(
    st.sampled_from(sorted(ACTIONS)), st.sampled_from(["a", "b", "c"]), st.integers(-1, 3)
)


@given(
    st.lists(st.tuples(ASKED, st.lists(st.integers(-1, 3), max_size=3)), max_size=8),
    st.dictionaries(st.integers(0, 2), st.sampled_from([Refusal.NONE, Refusal.GATE])),
)
def test_every_seed_of_every_request_gets_one_answer(
    asked: list[tuple[tuple[str, str, int], list[int]]], reasons: dict[int, Refusal]
) -> None:
    commands, expected = Commands(), Counter[tuple[int, str, str, int]]()
    for (action, layer, seed), more in asked:
        number = commands.add(action, layer, [seed, *more])
        expected.update((number, action, layer, each) for each in [seed, *more])
    commands.take(SEEN)
    settle(commands, "a", reasons)
    answers = commands.answered()
    found = Counter((a.number, a.action, a.layer_id, a.seed_id) for a in answers)
    assert found == expected
    done = [(a.layer_id, a.seed_id) for a in answers if a.refusal is Refusal.NONE]
    assert len(done) == len(set(done))
    assert commands.answered() == ()
