"""The coordinator beside layers that only answer: collecting, deciding, committing."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import numpy as np
import pytest

from esper_ray.errors import RunFailed
from esper_ray.events.log import EventKind
from esper_ray.events.messages import EpochReport, Evaluation, EvaluationRequest
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.lifecycle import Refusal
from esper_ray.storage import Root, RunLog, manifest
from tests.actors.coordination import READY, Layers, build, logged, report, run_epoch
from tests.builders import telemetry

# ------------------------------------------------------------------ collecting


async def test_epoch_ends_when_every_stage_has_reported(root: Root) -> None:
    coordinator, *_ = await build(root, actors=3)
    ending = asyncio.create_task(coordinator.end_epoch(0))
    for stage in (2, 0):
        await coordinator.ingest(report(0, stage=stage, loss=float(stage)))
        await asyncio.sleep(0)
        assert not ending.done()
    await coordinator.ingest(report(0, stage=1, loss=1.0))
    done = await asyncio.wait_for(ending, 5)
    assert (done.epoch, done.step, done.losses) == (0, 4, (2.0, 3.0, 2.0, 2.0))


async def test_silent_stage_fails_the_run_by_name_of_the_epoch(root: Root) -> None:
    coordinator, *_ = await build(root, actors=2, timeout_s=0.05)
    with pytest.raises(RunFailed, match="1 of 2 actors reported epoch 0"):
        await run_epoch(coordinator, report(0))


async def test_report_of_an_older_epoch_does_not_count(root: Root) -> None:
    coordinator, *_ = await build(root, timeout_s=0.05)
    await run_epoch(coordinator, report(0))
    with pytest.raises(RunFailed, match="0 of 1 actors reported epoch 1"):
        await coordinator.end_epoch(1)


async def test_repeated_report_counts_once_and_the_newest_wins(root: Root) -> None:
    coordinator, *_ = await build(root, actors=2, timeout_s=0.05)
    await coordinator.ingest(report(0, stage=1, loss=5.0))
    with pytest.raises(RunFailed, match="1 of 2"):
        await run_epoch(coordinator, report(0, stage=1, loss=6.0))
    done = await run_epoch(coordinator, report(0, stage=0))
    assert done.losses[0] == 6.0


async def test_report_that_comes_late_replaces_no_newer_one(root: Root) -> None:
    coordinator, *_ = await build(root, timeout_s=0.05)
    await coordinator.ingest(report(1, loss=6.0))
    await coordinator.ingest(report(0, loss=5.0))
    done = await coordinator.end_epoch(1)
    assert done.losses[0] == 6.0


# ------------------------------------------------------------------ deciding


async def test_dormant_seeds_germinate_and_are_counted(root: Root) -> None:
    coordinator, layers, _ = await build(root)
    seen = [telemetry([S.DORMANT] * 2, epochs=1, layer_id=name) for name in ("a", "b")]
    done = await run_epoch(coordinator, report(0, *seen))
    assert [b.layer_id for b in layers.batches] == ["a", "b"]
    assert layers.batches[0].blueprint_id.tolist() == [3, 3]
    assert sorted(done.moves) == [
        (name, seed, "DORMANT", "GERMINATED") for name in "ab" for seed in (0, 1)
    ]
    assert done.transitions == 4
    assert done.seeds == {"a": {"GERMINATED": 2}, "b": {"GERMINATED": 2}}
    assert done.states_visited == ("DORMANT", "GERMINATED")


async def test_refused_rows_change_no_count(root: Root) -> None:
    coordinator, layers, _ = await build(root)
    layers.refusal = Refusal.STALE_STATE
    done = await run_epoch(coordinator, report(0, telemetry([S.DORMANT] * 2, epochs=1)))
    assert len(layers.batches) == 1
    assert (done.transitions, done.moves, done.states_visited) == (0, (), ("DORMANT",))
    assert done.seeds == {"layer": {"DORMANT": 2}}


async def test_seeds_that_are_due_are_judged_one_setting_each(root: Root) -> None:
    coordinator, layers, _ = await build(root)
    growing = telemetry([S.TRAINING, S.EVALUATING], epochs=5, **READY)
    done = await run_epoch(coordinator, report(0, growing))
    (request,) = layers.requests
    assert (request.split, request.settings) == ("gate", 3)
    assert request.alphas["layer"].tolist() == [[0, 1], [1, 1], [0, 0]]
    assert [m.seed_ids.tolist() for m in layers.metrics] == [[0, 1]]
    assert ("layer", 0, "TRAINING", "GRAFTING") in done.moves


async def test_request_numbers_never_repeat(root: Root) -> None:
    coordinator, layers, _ = await build(root)
    growing = telemetry([S.EVALUATING] * 40, epochs=5)
    for epoch in range(3):
        await run_epoch(coordinator, report(epoch, growing))
        await coordinator.evaluate("test")
    numbers = [request.number for request in layers.requests]
    assert len(numbers) == 9  # 40 seeds need two requests
    assert len(set(numbers)) == 9
    assert [batch.number for batch in layers.batches] == [1, 2, 3]  # batches count on their own


async def test_stability_needs_five_gate_losses(root: Root) -> None:
    coordinator, layers, _ = await build(root)
    for epoch in range(6):
        await run_epoch(coordinator, report(epoch, telemetry([S.EVALUATING], epochs=epoch + 1)))
    steady = [bool(metrics.valid[0] & 4) for metrics in layers.metrics]
    assert steady == [False] * 4 + [True] * 2


# ------------------------------------------------------------------ committing


async def test_commit_falls_every_few_epochs_and_at_the_end(root: Root) -> None:
    coordinator, *_ = await build(root, every_epochs=3, epochs=5)
    commits = [(await run_epoch(coordinator, report(epoch))).commit for epoch in range(5)]
    assert commits == [None, None, 1, None, 2]
    body = RunLog(root).read_commit(2)
    assert (body["step"], body["epoch"], body["samples"]) == (20, 5, 160)
    assert (body["run"], body["config"]) == ("fake", {"seed": 1})
    named = {ref["name"]: ref["rows"] for ref in body["segments"]}
    assert named == {"stage0/host": 0, "metrics": 8}  # the steps since the commit before


async def test_seed_that_enters_grafting_forces_a_commit_which_its_row_names(root: Root) -> None:
    coordinator, layers, record = await build(root)
    await run_epoch(coordinator, report(0, telemetry([S.TRAINING] * 2)))
    growing = telemetry([S.TRAINING] * 2, epochs=5, epoch=1, **READY)
    done = await run_epoch(coordinator, report(1, growing))
    assert done.commit == record.next_seq
    assert layers.batches[-1].target.tolist() == [S.GRAFTING] * 2
    assert layers.batches[-1].checkpoint_id.tolist() == [record.next_seq] * 2


async def test_refused_grafting_forces_no_commit(root: Root) -> None:
    coordinator, layers, _ = await build(root)
    layers.refusal = Refusal.STALE_STATE
    growing = telemetry([S.TRAINING] * 2, epochs=5, **READY)
    assert (await run_epoch(coordinator, report(0, growing))).commit is None


async def test_run_goes_on_from_a_stored_progress(root: Root) -> None:
    coordinator, *_ = await build(root, epochs=1)
    await run_epoch(coordinator, report(0, telemetry([S.DORMANT] * 2, epochs=1)))
    stored = RunLog(root).read_commit(1)["coordinator"]
    resumed, layers, record = await build(root, progress=stored, epochs=2)
    done = await run_epoch(resumed, report(1, telemetry([S.GERMINATED] * 2, epochs=1)))
    assert (done.transitions, done.commit, record.next_seq) == (4, 2, 2)
    assert done.states_visited == ("DORMANT", "GERMINATED", "TRAINING")
    assert layers.requests[0].number > stored["number"] - 1


# ------------------------------------------------------------------ the event log


async def test_commit_names_the_events_since_the_commit_before(root: Root) -> None:
    coordinator, *_ = await build(root, every_epochs=2, epochs=4)
    for epoch in range(4):
        await run_epoch(coordinator, report(epoch, telemetry([S.DORMANT], epoch=epoch)))
    first, second = (manifest.log_part(RunLog(root).read_commit(seq)) for seq in (1, 2))
    assert first is not None
    assert second is not None
    assert first.file != second.file
    events = logged(root)
    assert len(events) == first.rows + second.rows
    epochs = logged(root, EventKind.EPOCH).columns["epoch"].tolist()
    assert epochs == [0, 1, 2, 3]


async def test_events_stand_in_the_order_in_which_things_were_done(root: Root) -> None:
    coordinator, *_ = await build(root, epochs=1)
    busy: dict[str, Any] = {
        "epochs": 5,
        "errors": np.array([0, 2, 0], np.int32),
        "chunk_gradient": np.zeros(3, np.float32),
    }
    seen = [
        telemetry([S.DORMANT, S.GRAFTING, S.EVALUATING], layer_id=name, **busy) for name in "ab"
    ]
    await run_epoch(coordinator, report(0, *seen))
    events = logged(root)
    kinds = [EventKind(kind).name for kind in events.columns["kind"].tolist()]
    assert list(zip(kinds, events.columns["layer"], strict=True)) == [
        *[(kind, "a") for kind in ("ERRORS", "SIGNALS", "EPOCH")],
        *[(kind, "b") for kind in ("ERRORS", "SIGNALS", "EPOCH")],
        ("METRICS", "a"),
        ("METRICS", "b"),
        *[("TRANSITION", "b")] * 2,  # in the order in which the receipts came
        *[("TRANSITION", "a")] * 2,
        ("REFUSAL", "a"),
        ("REFUSAL", "b"),
    ]
    assert events.columns["sequence"].tolist() == [1, 1, 1, 2, 2, 2, 3, 4, 5, 5, 6, 6, 7, 8]
    assert set(events.columns["step"].tolist()) == {4}


async def test_sequence_goes_on_after_a_resume(root: Root) -> None:
    coordinator, *_ = await build(root, epochs=1)
    await run_epoch(coordinator, report(0, telemetry([S.DORMANT] * 2, epochs=1)))
    stored = RunLog(root).read_commit(1)["coordinator"]
    assert stored["sequence"] == max(logged(root).columns["sequence"].tolist()) + 1  # its own
    resumed, *_ = await build(root, stored, resumed_from=1, epochs=2)
    await run_epoch(resumed, report(1, telemetry([S.GERMINATED] * 2, epochs=1)))
    sequence = logged(root).columns["sequence"]
    assert sequence.tolist() == sorted(sequence.tolist())
    changes = logged(root, EventKind.TRANSITION).columns
    assert changes["to_state"].tolist() == [S.GERMINATED] * 2 + [S.TRAINING] * 2


async def test_refusals_are_logged_at_commits_only(root: Root) -> None:
    coordinator, *_ = await build(root, every_epochs=3)
    for epoch in range(6):
        await run_epoch(coordinator, report(epoch, telemetry([S.TRAINING], epochs=5, epoch=epoch)))
    refused = logged(root, EventKind.REFUSAL).columns
    assert refused["epoch"].tolist() == [2, 5]
    assert refused["to_state"].tolist() == [S.GRAFTING] * 2
    assert "local_loss was not measured" in refused["gate"][0]


async def test_rows_that_a_layer_refuses_are_no_events(root: Root) -> None:
    coordinator, layers, _ = await build(root, epochs=1)
    layers.refusal = Refusal.STALE_GENERATION
    await run_epoch(coordinator, report(0, telemetry([S.DORMANT] * 2, epochs=1)))
    assert len(logged(root, EventKind.TRANSITION, EventKind.REFUSAL)) == 0


# ------------------------------------------------------------------ a loss that is no number


class Spoiled(Layers):
    """Evaluates to NaN unless the seeds of `culprits` are off; alone a culprit is enough."""

    culprits: tuple[int, ...] = ()

    async def evaluate(self, request: EvaluationRequest) -> Evaluation:
        plain = await super().evaluate(request)
        alphas = request.alphas.get("layer")
        on = np.ones((request.settings, 1)) if alphas is None else alphas[:, list(self.culprits)]
        loss = np.where((on > 0).any(axis=1), math.nan, plain.loss)
        change = loss - loss[0]
        return Evaluation(loss, plain.accuracy, change, change, change, plain.samples)


async def spoiled(root: Root, culprits: tuple[int, ...]) -> EpochReport:
    coordinator, layers, record = await build(root)
    twin = Spoiled(layers.log, record.run_epoch)
    twin.culprits = culprits
    await coordinator.setup(twin, None, record)
    states = [S.STABILIZATION, S.EVALUATING, S.FOSSILIZED]
    return await run_epoch(coordinator, report(0, telemetry(states, epochs=0)))


async def test_lesson_22_the_one_seed_that_spoils_the_loss_is_rolled_back(root: Root) -> None:
    done = await spoiled(root, (1,))
    assert done.moves == (("layer", 1, "EVALUATING", "ROLLED_BACK"),)
    assert math.isnan(done.gate_loss)


async def test_a_loss_that_no_single_seed_spoils_fails_the_run(root: Root) -> None:
    with pytest.raises(RunFailed, match="no single seed is to blame") as caught:
        await spoiled(root, (0, 1))
    assert "resume an earlier checkpoint" in caught.value.hint
