"""From a report to the one batch of a layer."""

from __future__ import annotations

import numpy as np

from esper_ray.lifecycle import Cause, Decision, LifecycleManager, TransitionRequest
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.policy import LayerReport, Measurement, PolicySettings, decide, transition_batch
from tests.builders import telemetry

NO_MINIMA = LifecycleManager(minimum_epochs={})
SETTINGS = PolicySettings(germinate_after=0, strategy_id=1, blueprint_id=0)
HARMFUL = Measurement(loss_on=2.2, loss_off=2.0, delta=-0.1, delta_low=-0.12)
HELPFUL = Measurement(loss_on=1.9, loss_off=2.0, delta=0.05, delta_low=0.04)
VAGUE = Measurement(loss_on=2.0, loss_off=2.0, delta=0.0, delta_low=-0.01)


def judged(
    states: list[S], epochs: int, measured: dict[int, Measurement] | None = None
) -> tuple[LayerReport, list[Decision]]:
    seen = telemetry(states, epochs, epoch=42)
    report = LayerReport(seen, 2.0, 0.99, measured or {})
    return report, decide(report, SETTINGS, NO_MINIMA)


def verdicts(decisions: list[Decision]) -> list[tuple[int, S, bool]]:
    return [
        (d.request.context.seed_id, d.request.context.target_state, d.accepted) for d in decisions
    ]


def test_the_first_accepted_move_is_made_and_otherwise_the_last_refusal_is_told() -> None:
    states = [S.EVALUATING] * 3
    _, decisions = judged(states, 40, {0: HELPFUL, 1: HARMFUL, 2: VAGUE})
    assert verdicts(decisions) == [
        (0, S.FINE_TUNING, True),
        (1, S.CULLED, True),
        (2, S.CULLED, False),
    ]
    assert decisions[2].reason == (
        "the evaluation is neither negative nor inconclusive for long enough"
    )


def test_an_inconclusive_seed_is_culled_in_the_end() -> None:
    assert verdicts(judged([S.EVALUATING], 89, {0: VAGUE})[1]) == [(0, S.CULLED, False)]
    assert verdicts(judged([S.EVALUATING], 90, {0: VAGUE})[1]) == [(0, S.CULLED, True)]


def test_an_opening_gate_wins_over_the_timeout() -> None:
    assert verdicts(judged([S.FINE_TUNING], 999, {0: HELPFUL})[1]) == [(0, S.FOSSILIZED, True)]
    late = judged([S.FINE_TUNING], 999, {0: VAGUE})[1]
    assert verdicts(late) == [(0, S.CULLED, True)]
    assert late[0].request.cause is Cause.TIMEOUT


def test_a_seed_that_makes_no_difference_is_never_fossilized() -> None:
    noop = Measurement(loss_on=2.0, loss_off=2.0, delta=0.0, delta_low=0.0)
    for state in (S.EVALUATING, S.FINE_TUNING):
        for epochs in (50, 149, 500):
            reached = verdicts(judged([state], epochs, {0: noop})[1])
            assert (0, S.FOSSILIZED, True) not in reached
            assert (0, S.FINE_TUNING, True) not in reached


def batch_of(report: LayerReport, decisions: list[Decision]) -> dict[str, list[int]]:
    requests: list[TransitionRequest] = [d.request for d in decisions if d.accepted]
    batch = transition_batch(report, requests, SETTINGS, number=5, checkpoint_id=17)
    assert (batch.layer_id, batch.number, batch.epoch) == ("layer", 5, 42)
    assert batch.seed_ids.dtype == np.int64
    assert batch.expected_generation.dtype == np.int16
    assert batch.target.dtype == np.int32
    return {
        name: getattr(batch, name).tolist()
        for name in ("seed_ids", "expected_state", "target", "cause")
    } | {
        name: getattr(batch, name).tolist()
        for name in ("blueprint_id", "strategy", "checkpoint_id")
    }


def test_only_the_newborn_get_a_blueprint_and_only_the_grafted_a_checkpoint() -> None:
    seen = telemetry(
        [S.DORMANT, S.TRAINING, S.STABILIZATION],
        200,
        epoch=42,
        local_loss=np.full(3, 0.1, dtype=np.float32),
        delta_ratio=np.full(3, 0.1, dtype=np.float32),
    )
    report = LayerReport(seen, 2.0, 0.99, {1: HELPFUL})
    assert batch_of(report, decide(report, SETTINGS, NO_MINIMA)) == {
        "seed_ids": [1, 2, 0],
        "expected_state": [S.TRAINING, S.STABILIZATION, S.DORMANT],
        "target": [S.GRAFTING, S.EVALUATING, S.GERMINATED],
        "cause": [0, 0, 0],
        "blueprint_id": [-1, -1, 0],
        "strategy": [-1, -1, 1],
        "checkpoint_id": [17, -1, -1],
    }


def test_no_request_makes_an_empty_batch() -> None:
    report, decisions = judged([S.FOSSILIZED], 5)
    assert decisions == []
    assert all(column == [] for column in batch_of(report, decisions).values())
