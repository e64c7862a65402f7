"""What is decided at an epoch boundary, asked without any layer or storage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from esper_ray.actors.decider import Decider, Measured, Measuring
from esper_ray.errors import RunFailed
from esper_ray.events.messages import Evaluation, EvaluationRequest
from esper_ray.grafting import GraftingSettings
from esper_ray.lifecycle import MINIMUM_EPOCHS, LifecycleManager, Refusal
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.policy import PolicySettings
from tests.builders import telemetry

STATES = [S.DORMANT, S.EVALUATING, S.FINE_TUNING, S.EVALUATING]


def decider(germinate_after: int = 100) -> Decider:
    manager = LifecycleManager(minimum_epochs=dict.fromkeys(MINIMUM_EPOCHS, 1))
    return Decider(PolicySettings(germinate_after=germinate_after), manager, GraftingSettings())


def answer(request: EvaluationRequest, loss: float) -> Evaluation:
    flipped = np.arange(request.settings) > 0
    change = np.where(flipped, 0.5, 0.0)
    return Evaluation(np.full(request.settings, loss) + change, change, change, change, change, 8)


def run(asking: Measuring, loss: float) -> tuple[list[EvaluationRequest], Measured]:
    """Every request, and what came of them."""
    requests = [next(asking)]
    while True:
        try:
            requests.append(asking.send(answer(requests[-1], loss)))
        except StopIteration as done:
            return requests, done.value[0]


def test_only_seeds_that_are_due_are_measured() -> None:
    seen = {"layer": telemetry(STATES, [9, 9, 0, 9])}
    (request,), found = run(decider().measure(seen), loss=1.0)
    assert request.settings == 3
    assert set(found) == {("layer", 1), ("layer", 3)}
    assert found["layer", 1].loss_on == 1.0
    assert found["layer", 1].loss_off == 1.5


def test_the_model_as_it_is_is_measured_where_no_seed_is_due() -> None:
    (request,), found = run(decider().measure({"layer": telemetry([S.DORMANT])}), loss=1.0)
    assert (request.settings, found) == (1, {})


def test_a_loss_that_is_no_number_has_every_blended_seed_measured() -> None:
    asked = decider()
    seen = {"layer": telemetry(STATES, 0)}
    with pytest.raises(RunFailed, match="no single seed is to blame"):
        run(asked.measure(seen), loss=math.nan)
    assert asked.progress.number == 2


def test_what_was_not_measured_is_known_of_nothing() -> None:
    asked = decider()
    seen = {"layer": telemetry(STATES, 99)}
    for epoch in range(6):
        now = asked.observe(epoch, 0, seen, {}, (math.nan, math.nan))
    assert now.layers["layer"].stability is None
    decided = asked.decide(now)["layer"]
    moved = decided.requests.target[decided.accepted]
    assert not {S.FINE_TUNING, S.FOSSILIZED} & set(moved.tolist())


def test_a_batch_is_booked_with_what_was_applied() -> None:
    asked = decider(germinate_after=0)
    seen = {"layer": telemetry([S.DORMANT, S.DORMANT], 9)}
    number = asked.commands.add("cancel", "layer", [1])
    now = asked.observe(0, 4, seen, {}, (1.0, math.nan))
    accepted = asked.settle(asked.decide(now))["layer"]
    batch = asked.batch(now, accepted, number=3, checkpoint_id=7)
    assert batch.seed_ids.tolist() == [0]
    assert batch.number == 3
    applied = asked.book(now, batch, np.array([True]), np.array([0], dtype=np.uint8))
    assert applied.target.tolist() == [S.GERMINATED]
    assert asked.progress.transitions == 1
    (told,) = asked.commands.answered()
    assert (told.number, told.seed_id, told.refusal) == (number, 1, Refusal.NOT_IN_TABLE)
