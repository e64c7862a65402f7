"""Events as the journal writes them, from what was seen, told, done and refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from esper_ray.actors.journal import Journal
from esper_ray.events.log import SCHEMA, EventKind, Events, decode, encode, parse_gate
from esper_ray.events.messages import TelemetryBatch
from esper_ray.lifecycle import Budgets, Cause, Decisions, LifecycleManager
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.policy import (
    Command,
    LayerReport,
    Measurement,
    PolicySettings,
    decide,
    transition_batch,
)
from tests.builders import metrics, signals, telemetry

POLICY = PolicySettings(germinate_after=0, blueprint_id=3, strategy_id=2)
MANAGER = LifecycleManager(replanting=True, budgets=Budgets(training_per_layer=1))


def kinds(events: Events) -> list[str]:
    return [EventKind(kind).name for kind in events.columns["kind"].tolist()]


def decided(
    seen: TelemetryBatch,
    measured: dict[int, Measurement] | None = None,
    commands: dict[int, Command] | None = None,
) -> Decisions:
    report = LayerReport(seen, 0.99, measured or {})
    judged = decide(report, POLICY, MANAGER, commands)
    occupied = {seen.layer_id: np.bincount(seen.state, minlength=len(S))}
    return MANAGER.admit([judged], occupied)[0]


def moved(journal: Journal, judged: Decisions) -> Events:
    accepted = judged.take(np.flatnonzero(judged.accepted))
    batch = transition_batch(accepted, POLICY, number=1, epoch=4, checkpoint_id=9)
    journal.moves(batch, accepted, step=40)
    return journal.drain()


# ------------------------------------------------------------------ an epoch


def test_epoch_of_a_layer_without_errors_or_grafting_is_one_event() -> None:
    journal = Journal(10)
    journal.epoch(telemetry([S.DORMANT, S.TRAINING], epoch=4), step=40)
    events = journal.drain()
    assert kinds(events) == ["EPOCH"]
    row = {name: values[0] for name, values in events.columns.items()}
    assert (row["sequence"], row["layer"], row["epoch"], row["step"]) == (11, "layer", 4, 40)
    assert (row["seed_id"], row["errors"]) == (-1, 2)  # the layer's number of seeds


def test_errors_and_signals_share_the_sequence_number_of_their_epoch() -> None:
    read = signals([1, 2], weight_drift=[0.25, math.nan], gradient_norm=3.0, loss_variance=0.5)
    seen = telemetry(
        [S.TRAINING, S.GRAFTING, S.GRAFTING],
        errors=np.array([2, 0, 1], np.int32),
        alpha=np.array([0, 0.25, 0.5], np.float32),
        signals=read,
    )
    journal = Journal(0)
    journal.epoch(seen, step=8)
    events = journal.drain()
    assert kinds(events) == ["ERRORS", "ERRORS", "SIGNALS", "SIGNALS", "EPOCH"]
    assert events.columns["sequence"].tolist() == [1] * 5
    assert events.columns["seed_id"].tolist() == [0, 2, 1, 2, -1]
    assert events.columns["errors"][:2].tolist() == [2, 1]
    rows = events.take(np.array([2, 3])).columns
    assert rows["alpha"].tolist() == [0.25, 0.5]
    np.testing.assert_array_equal(rows["weight_drift"], read.weight_drift)
    np.testing.assert_array_equal(rows["performance_delta"], read.performance_delta)
    np.testing.assert_array_equal(rows["accuracy_variance"], read.accuracy_variance)
    assert rows["gradient_norm"].tolist() == [3.0, 3.0]
    assert rows["loss_variance"].tolist() == [0.5, 0.5]


def test_metrics_are_events_as_they_were_told() -> None:
    told = metrics(
        [0, 3],
        [[1.0, 0.5, 0.9, 2.0], [3.0, 0.25, 0.8, 0.0]],
        valid=[0b1111, 0b0001],
        score=[0.125, math.nan],
    )
    journal = Journal(0)
    journal.metrics(told, epoch=4, step=40)
    events = journal.drain()
    columns = events.columns
    assert kinds(events) == ["METRICS"] * 2
    assert columns["sequence"].tolist() == [1, 1]
    assert columns["seed_id"].tolist() == [0, 3]
    for index, name in enumerate(("loss", "accuracy", "stability", "efficiency")):
        assert columns[name].tolist() == told.metrics[:, index].tolist()
    assert columns["valid"].tolist() == [0b1111, 1]
    np.testing.assert_array_equal(columns["score"], told.score)


def test_metrics_of_no_seed_are_no_event() -> None:
    journal = Journal(0)
    journal.metrics(metrics([]), epoch=4, step=40)
    assert len(journal.drain()) == 0


# ------------------------------------------------------------------ moves


def test_move_carries_what_the_layer_was_told_and_the_gate_behind_it() -> None:
    ready = {"local_loss": np.ones(2, np.float32), "delta_ratio": np.full(2, 0.25, np.float32)}
    seen = telemetry([S.TRAINING, S.DORMANT], epochs=[120, 0], **ready)
    events = moved(Journal(0), decided(seen, {0: Measurement(1.0, 1.0, 0.0, -0.1)}))
    columns = events.columns
    assert kinds(events) == ["TRANSITION"] * 2
    assert columns["sequence"].tolist() == [1, 1]
    assert columns["seed_id"].tolist() == [0, 1]
    assert columns["from_state"].tolist() == [S.TRAINING, S.DORMANT]
    assert columns["to_state"].tolist() == [S.GRAFTING, S.GERMINATED]
    assert columns["cause"] == ["POLICY", "POLICY"]
    assert columns["strategy"].tolist() == [-1, 2]
    assert columns["blueprint_id"].tolist() == [-1, 3]
    assert columns["checkpoint_id"].tolist() == [9, -1]
    assert columns["alpha"].tolist() == [0.0, 0.0]
    assert columns["score"].tolist() == pytest.approx([0.0, math.nan], nan_ok=True)
    gate = parse_gate(columns["gate"][0])
    assert gate is not None
    assert (gate["name"], gate["verdict"]) == ("readiness", "accepted")
    assert gate["inputs"]["delta_ratio"] == 0.25
    assert gate["thresholds"]["delta_ratio"] == "<= 0.5"
    assert columns["gate"][1] == ""  # no gate stands before germination


def test_alpha_of_a_move_is_that_of_its_target() -> None:
    seen = telemetry([S.GRAFTING, S.STABILIZATION], epochs=99, alpha=np.ones(2, np.float32))
    columns = moved(Journal(0), decided(seen)).columns
    assert columns["to_state"].tolist() == [S.STABILIZATION, S.EVALUATING]
    assert columns["alpha"].tolist() == [1.0, 1.0]


def test_new_generation_is_a_replant_beside_the_transitions() -> None:
    again = Command(1, S.DORMANT, Cause.REPLANT)
    generation = np.array([0, 3, 0], np.int16)
    seen = telemetry([S.DORMANT, S.CULLED, S.GERMINATED], epochs=1, generation=generation)
    events = moved(Journal(0), decided(seen, commands={1: again}))
    columns = events.columns
    assert kinds(events) == ["TRANSITION", "TRANSITION", "REPLANT"]
    assert columns["sequence"].tolist() == [1, 1, 1]
    assert columns["seed_id"].tolist() == [0, 2, 1]
    assert columns["generation"].tolist() == [0, 0, 3]
    assert (columns["cause"][2], columns["to_state"][2]) == ("REPLANT", S.DORMANT)


# ------------------------------------------------------------------ refusals


def test_refusals_tell_the_reason_and_accepted_rows_are_left_out() -> None:
    seen = telemetry([S.GERMINATED, S.GERMINATED, S.TRAINING, S.TRAINING], epochs=[1, 1, 5, 150])
    judged = decided(seen)
    journal = Journal(0)
    journal.refusals(judged, epoch=4, step=40)
    events = journal.drain()
    columns = events.columns
    assert kinds(events) == ["REFUSAL"] * 4
    assert set(columns["sequence"].tolist()) == {1}
    gates = [parse_gate(text) for text in columns["gate"]]
    assert all(gates)
    verdicts = [gate["verdict"] for gate in gates if gate is not None]
    assert verdicts == [
        "the budget of the target state is used up",
        "the budget of the target state is used up",
        "TRAINING lasts at least 100 epochs, this seed has spent 5",
        "local_loss was not measured, and a finite value is needed",
    ]
    assert columns["to_state"].tolist() == [S.TRAINING] * 2 + [S.GRAFTING] * 2
    assert columns["cause"] == ["POLICY"] * 4


def test_nothing_refused_is_no_event() -> None:
    journal = Journal(0)
    journal.refusals(decided(telemetry([S.DORMANT])), epoch=0, step=0)
    assert len(journal.drain()) == 0


# ------------------------------------------------------------------ the journal itself


def test_events_wait_until_they_are_drained_and_numbers_go_on() -> None:
    journal = Journal(7)
    journal.epoch(telemetry([S.DORMANT], layer_id="a"), step=8)
    journal.epoch(telemetry([S.DORMANT], layer_id="b"), step=8)
    assert journal.drain().columns["sequence"].tolist() == [8, 9]
    assert len(journal.drain()) == 0
    journal.epoch(telemetry([S.DORMANT], layer_id="a"), step=16)
    assert journal.drain().columns["sequence"].tolist() == [12]  # two commits took one each
    assert journal.sequence == 13


def test_journal_can_be_stored_and_read_again() -> None:
    journal = Journal(0)
    seen = telemetry([S.GRAFTING, S.GERMINATED], epochs=1, errors=np.array([1, 0], np.int32))
    journal.epoch(seen, step=8)
    journal.metrics(metrics([0], [[1.0] * 4], valid=[15]), epoch=0, step=8)
    journal.refusals(decided(seen), epoch=0, step=8)
    events = journal.drain()
    again = decode(encode(events))
    for name in SCHEMA:
        np.testing.assert_array_equal(again.columns[name], events.columns[name])
