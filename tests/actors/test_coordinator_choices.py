"""What the coordinator makes of requests, budgets and strategies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from esper_ray.actors.lifecycle_coordinator import LifecycleCoordinator
from esper_ray.errors import ConfigError
from esper_ray.events.log import EventKind
from esper_ray.events.messages import Answer, EpochReport
from esper_ray.grafting import (
    GraftingSettings,
    SelectorSettings,
    StrategyOutcomes,
    StrategySelector,
    strategy_id,
)
from esper_ray.lifecycle import Budgets, LifecycleManager, Refusal
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.policy import PolicySettings
from esper_ray.storage import Root, RunLog
from tests.actors.coordination import MINIMA, READY, build, logged, report, run_epoch
from tests.builders import telemetry


def targets(done: EpochReport) -> dict[int, str]:
    return {seed: target for _, seed, _, target in done.moves}


# ------------------------------------------------------------------ requests of people

LATE = PolicySettings(germinate_after=1_000)


async def answers(
    coordinator: LifecycleCoordinator, states: list[S], **seen: Any
) -> tuple[EpochReport, list[Answer]]:
    done = await run_epoch(coordinator, report(0, telemetry(states, **seen)))
    return done, list(done.answers)


@pytest.mark.parametrize(
    ("action", "state", "target"),
    [
        ("germinate", S.DORMANT, S.GERMINATED),
        ("cancel", S.TRAINING, S.CANCELLED),
        ("cull", S.TRAINING, S.CULLED),
        ("rollback", S.GRAFTING, S.ROLLED_BACK),
    ],
)
async def test_request_takes_the_place_of_the_policy_s_move(
    root: Root, action: str, state: S, target: S
) -> None:
    coordinator, layers, _ = await build(root, policy=LATE)
    number = await coordinator.request(action, "layer", [1])
    ready = {**READY, "alpha": np.ones(2, np.float32) * (state == S.GRAFTING)}
    done, found = await answers(coordinator, [state] * 2, epochs=5, **ready)
    assert targets(done)[1] == target.name
    assert found == [Answer(number, action, "layer", 1, Refusal.NONE)]
    assert targets(done).get(0) != target.name
    assert [batch.cause.tolist()[-1] for batch in layers.batches] == [1]  # USER


@pytest.mark.parametrize(
    ("action", "state", "epochs", "refusal"),
    [
        ("germinate", S.TRAINING, 5, Refusal.NOT_IN_TABLE),
        ("cancel", S.EVALUATING, 5, Refusal.NOT_IN_TABLE),
        ("cull", S.EVALUATING, 5, Refusal.GATE),
        ("cull", S.TRAINING, 0, Refusal.TOO_EARLY),
        ("cull", S.FOSSILIZED, 5, Refusal.TERMINAL),
        ("replant", S.CULLED, 5, Refusal.REPLANTING_OFF),
        ("replant", S.TRAINING, 5, Refusal.REPLANTING_OFF),
    ],
)
async def test_request_that_the_manager_refuses_is_answered_with_its_reason(
    root: Root, action: str, state: S, epochs: int, refusal: Refusal
) -> None:
    coordinator, layers, _ = await build(root, policy=LATE)
    layers.gain = 0.0  # a seed in EVALUATING neither helps nor harms
    number = await coordinator.request(action, "layer", [0])
    done, found = await answers(coordinator, [state], epochs=epochs)
    assert found == [Answer(number, action, "layer", 0, refusal)]
    assert done.moves == ()  # nor does the policy move a seed of which something else was asked


async def test_request_that_names_nothing_is_answered_at_once(root: Root) -> None:
    coordinator, *_ = await build(root, policy=LATE)
    await coordinator.request("cull", "nowhere", [0])
    await coordinator.request("cull", "layer", [-1, 2])
    _, found = await answers(coordinator, [S.TRAINING] * 2, epochs=5)
    assert [(a.number, a.layer_id, a.seed_id) for a in found] == [
        (1, "nowhere", 0),
        (2, "layer", -1),
        (2, "layer", 2),
    ]
    assert {a.refusal for a in found} == {Refusal.UNKNOWN_SEED}


async def test_first_of_two_requests_for_a_seed_stands(root: Root) -> None:
    coordinator, *_ = await build(root, policy=LATE)
    await coordinator.request("cancel", "layer", [0, 0])
    await coordinator.request("cull", "layer", [1, 0])
    done, found = await answers(coordinator, [S.TRAINING] * 2, epochs=5)
    assert targets(done) == {0: "CANCELLED", 1: "CULLED"}
    assert [(a.number, a.seed_id, a.refusal) for a in found] == [
        (1, 0, Refusal.DUPLICATE_SEED),
        (1, 0, Refusal.NONE),
        (2, 0, Refusal.DUPLICATE_SEED),
        (2, 1, Refusal.NONE),
    ]


async def test_request_that_the_layer_refuses_is_answered_with_the_layer_s_reason(
    root: Root,
) -> None:
    coordinator, layers, _ = await build(root, policy=LATE)
    layers.refusal = Refusal.STALE_STATE
    await coordinator.request("cull", "layer", [0])
    done, (found,) = await answers(coordinator, [S.TRAINING], epochs=5)
    assert (found.refusal, done.moves) == (Refusal.STALE_STATE, ())


async def test_refused_request_is_logged_though_its_epoch_does_not_commit(root: Root) -> None:
    coordinator, *_ = await build(root, policy=LATE, epochs=3)
    for epoch in range(3):
        if epoch == 1:
            await coordinator.request("cull", "layer", [0])
        seen = telemetry([S.TRAINING, S.TRAINING], epochs=0, epoch=epoch)
        await run_epoch(coordinator, report(epoch, seen))
    found = logged(root, EventKind.REFUSAL).columns
    told = list(
        zip(found["epoch"].tolist(), found["cause"], found["seed_id"].tolist(), strict=True)
    )
    assert told == [(1, "USER", 0), (2, "POLICY", 0), (2, "POLICY", 1)]


async def test_what_a_person_had_done_is_committed_at_once(root: Root) -> None:
    coordinator, *_ = await build(root, policy=LATE)
    await coordinator.request("cancel", "layer", [0])
    done, (found,) = await answers(coordinator, [S.TRAINING] * 2, epochs=5)
    assert (found.refusal, done.commit) == (Refusal.NONE, 1)
    await coordinator.request("cancel", "layer", [7])
    seen = telemetry([S.CANCELLED, S.TRAINING], epochs=0, epoch=1)
    assert (await run_epoch(coordinator, report(1, seen))).commit is None  # nothing was done


async def test_answer_is_given_in_one_epoch_only(root: Root) -> None:
    coordinator, *_ = await build(root, policy=LATE)
    await coordinator.request("cull", "layer", [0])
    for epoch, expected in enumerate((1, 0)):
        done = await run_epoch(coordinator, report(epoch, telemetry([S.TRAINING], epochs=5)))
        assert len(done.answers) == expected


async def test_unknown_action_is_refused_and_takes_no_number(root: Root) -> None:
    coordinator, *_ = await build(root)
    with pytest.raises(ConfigError, match="no action is named 'water'"):
        await coordinator.request("water", "layer", [0])
    assert await coordinator.request("cull", "layer", []) == 1


@pytest.mark.parametrize(
    ("state", "ended", "refusal"),
    [
        (S.CULLED, 0, Refusal.EMBARGO),
        (S.CULLED, -3, Refusal.NONE),
        (S.CANCELLED, 0, Refusal.NONE),
        (S.ROLLED_BACK, 0, Refusal.NONE),
        (S.FOSSILIZED, -9, Refusal.NOT_IN_TABLE),
    ],
)
async def test_replanting_waits_for_the_embargo_of_culled_seeds(
    root: Root, state: S, ended: int, refusal: Refusal
) -> None:
    manager = LifecycleManager(
        minimum_epochs=MINIMA, replanting=True, budgets=Budgets(embargo_epochs=3)
    )
    coordinator, *_ = await build(root, policy=LATE, manager=manager, epochs=1)
    await coordinator.request("replant", "layer", [0])
    change = np.array([ended], np.int32)
    done, (found,) = await answers(coordinator, [state], last_change=change)
    assert found.refusal is refusal
    assert targets(done) == ({0: "DORMANT"} if refusal is Refusal.NONE else {})
    assert done.transitions == 0  # a new generation is no transition
    assert len(logged(root, EventKind.REPLANT)) == (refusal is Refusal.NONE)
    assert len(logged(root, EventKind.TRANSITION)) == 0


# ------------------------------------------------------------------ budgets


@pytest.mark.parametrize(
    ("budgets", "trained"),
    [
        (Budgets(training_in_all=3), {("a", 0), ("b", 0)}),
        (Budgets(training_per_layer=2), {("a", 0), ("b", 0), ("b", 1)}),
        (Budgets(training_per_layer=1), {("b", 0)}),
        (Budgets(training_in_all=1), set()),
    ],
)
async def test_budgets_hold_over_all_layers_at_once(
    root: Root, budgets: Budgets, trained: set[tuple[str, int]]
) -> None:
    manager = LifecycleManager(minimum_epochs=MINIMA, budgets=budgets)
    coordinator, layers, _ = await build(root, policy=LATE, manager=manager, epochs=1)
    one = telemetry([S.GERMINATED, S.GERMINATED, S.TRAINING], epochs=1, layer_id="a")
    two = telemetry([S.GERMINATED, S.GERMINATED], epochs=1, layer_id="b")
    done = await run_epoch(coordinator, report(0, one, two))
    assert {(layer, seed) for layer, seed, *_ in done.moves} == trained
    over = logged(root, EventKind.REFUSAL).columns
    waiting = [gate for gate in over["gate"] if "budget" in gate]
    assert len(waiting) == 4 - len(done.moves)
    assert len(layers.batches) == len({layer for layer, *_ in done.moves})


async def test_seed_that_gets_no_room_stays_where_it_is(root: Root) -> None:
    manager = LifecycleManager(minimum_epochs=MINIMA, budgets=Budgets(grafting_in_all=1))
    coordinator, *_ = await build(root, policy=LATE, manager=manager)
    done, _ = await answers(coordinator, [S.TRAINING] * 2, epochs=5, **READY)
    assert targets(done) == {0: "GRAFTING"}


# ------------------------------------------------------------------ strategies

NAMES = ("linear", "momentum", "stability")


def selecting(mode: str, **given: Any) -> GraftingSettings:
    arms = NAMES if mode in ("ab", "bandit") else ()
    chosen: Any = {"mode": mode, "strategy": "adaptive", "arms": arms, **given}
    return GraftingSettings(selection=SelectorSettings(**chosen))


@pytest.mark.parametrize("mode", ["fixed", "performance", "ab", "bandit"])
async def test_strategy_is_assigned_at_germination_and_only_there(root: Root, mode: str) -> None:
    settings = selecting(mode, experiment="one")
    coordinator, layers, _ = await build(root, grafting=settings)
    states = [S.DORMANT] * 6 + [S.GERMINATED] * 2
    await run_epoch(coordinator, report(0, telemetry(states, epochs=1)))
    (batch,) = layers.batches
    expected = StrategySelector(settings).assign("layer", np.arange(6), StrategyOutcomes())
    assert batch.strategy.tolist() == [*expected.tolist(), -1, -1]
    known = {strategy_id(name) for name in (NAMES if mode in ("ab", "bandit") else ["adaptive"])}
    assert set(batch.strategy[:6].tolist()) == known


async def test_bandit_counts_what_was_planted_and_gained_before(root: Root) -> None:
    coordinator, layers, _ = await build(root, grafting=selecting("bandit"), epochs=3)
    layers.gain = -0.9  # off minus on: a blended seed harms
    await run_epoch(coordinator, report(0, telemetry([S.DORMANT] * 3, epochs=1)))
    assert layers.batches[0].strategy.tolist() == [0, 2, 4]  # one try each
    arms = np.array([0, 2, 4], np.int32)
    judged = telemetry([S.EVALUATING] * 3, epochs=5, epoch=1, strategy=arms)
    await run_epoch(coordinator, report(1, judged))
    await run_epoch(coordinator, report(2, telemetry([S.DORMANT], epochs=1, epoch=2)))
    assert layers.batches[-1].strategy.tolist() == [0]  # all are equal again: the first arm
    body = RunLog(root).read_commit(1)["coordinator"]
    outcomes = StrategyOutcomes.from_json(body["outcomes"])
    assert [outcomes[name].planted for name in NAMES] == [2, 1, 1]
    assert [outcomes[name].evaluated for name in NAMES] == [1, 1, 1]
    assert [outcomes[name].culled for name in NAMES] == [1, 1, 1]
    assert outcomes["linear"].delta_sum == pytest.approx(-0.9)
