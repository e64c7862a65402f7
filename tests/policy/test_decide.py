"""From a report to decisions, and from decisions to the one batch of a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_ray.lifecycle import Budgets, Cause, Decisions, LifecycleManager, Refusal, move_of
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.policy import Command, Measurement, PolicySettings, decide, transition_batch
from tests.policy.reports import (
    GUILTY,
    HARMFUL,
    HELPFUL,
    NO_MINIMA,
    VAGUE,
    floats,
    ints,
    report,
    verdicts,
)

SETTINGS = PolicySettings(germinate_after=0, strategy_id=1, blueprint_id=0)


def judged(
    states: Sequence[S],
    epochs: int | Sequence[int],
    measured: Mapping[int, Measurement] | None = None,
    *,
    manager: LifecycleManager = NO_MINIMA,
    commands: Mapping[int, Command] | None = None,
    policy: PolicySettings = SETTINGS,
    **columns: Any,
) -> Decisions:
    given = {"epoch": 42, "stability": 0.99, **columns}
    return decide(report(states, epochs, measured=measured, **given), policy, manager, commands)


def test_the_second_move_is_made_where_the_first_is_refused_and_it_alone_is_accepted() -> None:
    decided = judged([S.EVALUATING] * 3, 40, {0: HELPFUL, 1: HARMFUL, 2: VAGUE})
    assert verdicts(decided) == [
        (0, S.FINE_TUNING, "NONE"),
        (1, S.CULLED, "NONE"),
        (2, S.FINE_TUNING, "GATE"),
    ]
    assert decided.explain(2).verdict == (
        "the lower bound of performance_delta is -0.01, and > 0 is needed"
    )


def test_lesson_24_an_inconclusive_seed_is_culled_in_the_end() -> None:
    assert verdicts(judged([S.EVALUATING], 89, {0: VAGUE})) == [(0, S.FINE_TUNING, "GATE")]
    assert verdicts(judged([S.EVALUATING], 90, {0: VAGUE})) == [(0, S.CULLED, "NONE")]
    assert judged([S.EVALUATING], 90, {0: VAGUE}).requests.cause.tolist() == [Cause.POLICY]


def test_lesson_24_a_seed_that_was_never_measured_is_culled_in_the_end_too() -> None:
    assert verdicts(judged([S.EVALUATING], 89)) == [(0, S.FINE_TUNING, "GATE")]
    assert verdicts(judged([S.EVALUATING], 90)) == [(0, S.CULLED, "NONE")]


def test_an_opening_gate_wins_over_the_timeout() -> None:
    assert verdicts(judged([S.FINE_TUNING], 999, {0: HELPFUL})) == [(0, S.FOSSILIZED, "NONE")]
    late = judged([S.FINE_TUNING], 999, {0: VAGUE})
    assert verdicts(late) == [(0, S.CULLED, "NONE")]
    assert late.requests.cause.tolist() == [Cause.TIMEOUT]


@pytest.mark.parametrize(
    ("state", "epochs", "target"),
    [(S.TRAINING, 300, S.CULLED), (S.GRAFTING, 200, S.ROLLED_BACK), (S.FINE_TUNING, 150, S.CULLED)],
)
def test_a_state_that_a_seed_cannot_leave_well_ends_at_its_timeout(
    state: S, epochs: int, target: S
) -> None:
    manager = LifecycleManager()
    assert verdicts(judged([state], epochs - 1, manager=manager))[0][2] == "GATE"
    late = judged([state], epochs, manager=manager)
    assert verdicts(late) == [(0, target, "NONE")]
    assert late.requests.cause.tolist() == [Cause.TIMEOUT]


def test_a_timeout_waits_for_the_minimum_where_that_is_longer() -> None:
    policy = PolicySettings(germinate_after=10**6, training_timeout=10)
    seen = judged([S.TRAINING], 50, manager=LifecycleManager(), policy=policy)
    assert verdicts(seen) == [(0, S.GRAFTING, "TOO_EARLY")]


def test_a_blended_seed_waits_for_the_minimum_and_is_not_rolled_back_for_it() -> None:
    policy = PolicySettings(germinate_after=10**6, ramp_epochs=5)
    for epochs, reason in [(20, "TOO_EARLY"), (49, "TOO_EARLY"), (50, "NONE")]:
        decided = judged(
            [S.GRAFTING], epochs, manager=LifecycleManager(), policy=policy, alpha=floats(1.0)
        )
        assert verdicts(decided) == [(0, S.STABILIZATION, reason)]


def test_an_error_ends_a_seed_without_waiting_for_the_minimum() -> None:
    states = [S.TRAINING, S.GRAFTING, S.STABILIZATION, S.FINE_TUNING]
    decided = judged(states, 0, manager=LifecycleManager(), error_count=ints(6, 6, 6, 6))
    ends = [S.CULLED, S.ROLLED_BACK, S.ROLLED_BACK, S.ROLLED_BACK]
    assert verdicts(decided) == [(seed, end, "NONE") for seed, end in enumerate(ends)]
    assert decided.requests.cause.tolist() == [Cause.ERROR] * 4


def test_a_seed_with_too_many_errors_in_evaluating_is_culled_by_its_gate() -> None:
    decided = judged([S.EVALUATING] * 2, 30, manager=LifecycleManager(), error_count=ints(5, 6))
    assert verdicts(decided) == [(0, S.FINE_TUNING, "GATE"), (1, S.CULLED, "NONE")]


@pytest.mark.parametrize(
    "noop",
    [
        Measurement(loss_on=2.0, loss_off=2.0, delta=0.0, delta_low=0.0),
        Measurement(loss_on=math.nan, loss_off=2.0, delta=math.nan, delta_low=math.nan),
        Measurement(loss_on=1.0, loss_off=2.0, delta=0.5, delta_low=math.nan),
    ],
)
def test_a_seed_that_makes_no_certain_difference_is_never_fossilized(noop: Measurement) -> None:
    for state in (S.EVALUATING, S.FINE_TUNING):
        for epochs in (50, 149, 500):
            [(_, target, reason)] = verdicts(judged([state], epochs, {0: noop}))
            assert target in (S.CULLED, S.ROLLED_BACK) or reason == "GATE"


@pytest.mark.parametrize(("loss", "reason"), [(0.01, "NONE"), (0.011, "GATE"), (math.nan, "GATE")])
def test_reconstruction_grafts_by_its_own_loss_without_a_counterfactual(
    loss: float, reason: str
) -> None:
    policy = PolicySettings(objective="reconstruction", germinate_after=10**6)
    # 0.01 as float32 is a little less than the threshold.
    decided = judged([S.TRAINING], 150, policy=policy, local_loss=floats(loss))
    assert verdicts(decided) == [(0, S.GRAFTING, reason)]
    assert decided.explain(0).gate == "reconstruction"


def test_gradient_target_grafts_by_ratio_and_counterfactual() -> None:
    columns: dict[str, Any] = {
        "local_loss": floats(1.0, 1.0, 1.0),
        "delta_ratio": floats(0.1, 0.1, 0.9),
    }
    seen = judged([S.TRAINING] * 3, 150, {0: HELPFUL, 2: HELPFUL}, **columns)
    assert [reason for _, _, reason in verdicts(seen)] == ["NONE", "GATE", "GATE"]
    assert seen.explain(1).verdict == "alpha_one_loss_ratio was not measured, and <= 1.01 is needed"


# ---- what a person asked -----------------------------------------------------------------------


def test_an_accepted_command_is_made_instead_of_the_policys_move() -> None:
    commands = {0: Command(1, *move_of("rollback")), 1: Command(1, *move_of("germinate"))}
    decided = judged([S.FINE_TUNING, S.DORMANT], 200, {0: HELPFUL}, commands=commands)
    assert verdicts(decided) == [(0, S.ROLLED_BACK, "NONE"), (1, S.GERMINATED, "NONE")]
    assert decided.requests.cause.tolist() == [Cause.USER, Cause.USER]


@pytest.mark.parametrize(
    ("state", "action", "reason"),
    [
        (S.EVALUATING, "cull", "GATE"),
        (S.EVALUATING, "germinate", "NOT_IN_TABLE"),
        (S.FOSSILIZED, "rollback", "TERMINAL"),
        (S.CULLED, "replant", "REPLANTING_OFF"),
    ],
)
def test_a_refused_command_is_told_and_no_second_move_is_tried(
    state: S, action: str, reason: str
) -> None:
    target, cause = move_of(action)
    decided = judged([state], 80, {0: VAGUE}, commands={0: Command(1, target, cause)})
    assert verdicts(decided) == [(0, target, reason)]


def test_a_replanted_seed_waits_by_the_epochs_since_its_end() -> None:
    replant = {0: Command(1, *move_of("replant"))}
    manager = LifecycleManager(replanting=True, budgets=Budgets(embargo_epochs=10))
    for last, reason in [(33, "EMBARGO"), (32, "NONE"), (31, "NONE")]:
        decided = judged(
            [S.CULLED], 0, manager=manager, commands=replant, last_change=ints(last), epoch=42
        )
        assert verdicts(decided) == [(0, S.DORMANT, reason)]


def test_a_late_seed_whose_gate_opens_is_not_culled_for_want_of_room() -> None:
    manager = LifecycleManager(budgets=Budgets(grafting_per_layer=1))
    columns: dict[str, Any] = {"local_loss": floats(1.0), "delta_ratio": floats(0.1)}
    decided = judged([S.TRAINING], 300, {0: HELPFUL}, manager=manager, **columns)
    full = np.zeros(len(S), dtype=np.int64)
    full[S.GRAFTING] = 1
    [kept] = manager.admit([decided], {"layer": full})
    assert verdicts(kept) == [(0, S.GRAFTING, "BUDGET")]


# ---- a layer is its seeds ----------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seeds=st.lists(
        st.tuples(
            st.sampled_from(list(S)),
            st.sampled_from([0, 30, 90, 100, 149, 150, 200, 300]),
            st.integers(0, 7),
            st.sampled_from([None, HELPFUL, HARMFUL, VAGUE, GUILTY]),
            st.floats(0, 1, width=32),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_seeds_of_a_layer_are_decided_as_if_each_were_alone(
    seeds: list[tuple[S, int, int, Measurement | None, float]],
) -> None:
    def decided(chosen: list[tuple[S, int, int, Measurement | None, float]]) -> Decisions:
        states, epochs, errors, found, ratios = map(list, zip(*chosen, strict=True))
        return judged(
            states,
            epochs,
            {i: m for i, m in enumerate(found) if m is not None},
            manager=LifecycleManager(),
            error_count=ints(*errors),
            delta_ratio=floats(*ratios),
            local_loss=floats(*ratios),
        )

    single = [
        (seed, target, reason)
        for seed, one in enumerate(seeds)
        for _, target, reason in verdicts(decided([one]))
    ]
    assert verdicts(decided(seeds)) == single


# ---- the batch ---------------------------------------------------------------------------------

COLUMNS = ("seed_ids", "expected_state", "target", "cause", "blueprint_id", "strategy")


def batch_of(decided: Decisions, **given: Any) -> dict[str, list[int]]:
    batch = transition_batch(decided, SETTINGS, number=5, epoch=42, **given)
    assert (batch.layer_id, batch.number, batch.epoch) == ("layer", 5, 42)
    assert batch.seed_ids.dtype == np.int64
    assert batch.expected_generation.dtype == np.int16
    for name in (*COLUMNS[1:], "checkpoint_id"):
        assert getattr(batch, name).dtype == np.int32
    return {name: getattr(batch, name).tolist() for name in (*COLUMNS, "checkpoint_id")}


def growing() -> Decisions:
    columns: dict[str, Any] = {
        "local_loss": floats(0.1, 0.1, 0.1),
        "delta_ratio": floats(0.1, 0.1, 0.1),
    }
    generation = np.array([3, 4, 5], dtype=np.int16)
    states = [S.DORMANT, S.TRAINING, S.STABILIZATION]
    return judged(states, 200, {1: HELPFUL}, generation=generation, **columns)


def test_only_the_newborn_get_a_blueprint_and_only_the_grafted_a_checkpoint() -> None:
    assert batch_of(growing(), checkpoint_id=17) == {
        "seed_ids": [0, 1, 2],
        "expected_state": [S.DORMANT, S.TRAINING, S.STABILIZATION],
        "target": [S.GERMINATED, S.GRAFTING, S.EVALUATING],
        "cause": [0, 0, 0],
        "blueprint_id": [0, -1, -1],
        "strategy": [1, -1, -1],
        "checkpoint_id": [-1, 17, -1],
    }
    batch = transition_batch(growing(), SETTINGS, 5, 42)
    assert batch.expected_generation.tolist() == [3, 4, 5]
    assert batch.checkpoint_id.tolist() == [-1, -1, -1]


def test_a_chosen_strategy_is_for_the_newborn_only() -> None:
    assert batch_of(growing(), strategy=ints(4, 3, 2))["strategy"] == [4, -1, -1]


def test_a_batch_has_a_row_per_decision_accepted_or_not() -> None:
    decided = judged([S.EVALUATING, S.GERMINATED], 40, {0: VAGUE})
    assert decided.reason.tolist() == [Refusal.GATE, Refusal.NONE]
    assert batch_of(decided)["seed_ids"] == [0, 1]
    assert batch_of(decided.take(np.flatnonzero(decided.accepted)))["seed_ids"] == [1]


def test_a_replanted_seed_gets_no_blueprint_yet() -> None:
    replant = {0: Command(1, *move_of("replant"))}
    decided = judged([S.CULLED], 5, commands=replant, manager=LifecycleManager(replanting=True))
    batch = transition_batch(decided, SETTINGS, 5, 42)
    assert batch.replants.tolist() == [True]
    assert (batch.blueprint_id.tolist(), batch.strategy.tolist()) == ([-1], [-1])


def test_no_request_makes_an_empty_batch() -> None:
    decided = judged([S.FOSSILIZED], 5)
    assert verdicts(decided) == []
    assert all(column == [] for column in batch_of(decided).values())
