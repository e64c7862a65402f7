"""The coordinator beside a pipeline that only answers: collecting, deciding, committing."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_ray.actors.lifecycle_coordinator import CoordinatorSpec, LifecycleCoordinator, Progress
from esper_ray.errors import RunFailed
from esper_ray.events.messages import (
    EpochReport,
    Evaluation,
    EvaluationRequest,
    MetricsBatch,
    StageReport,
    TelemetryBatch,
    TransitionBatch,
    TransitionReceipt,
)
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.lifecycle import LifecycleManager
from esper_ray.policy import PolicySettings
from esper_ray.storage import EpochRecord, Root, RunLog, SegmentRef
from tests.builders import telemetry

MINIMA = dict.fromkeys(S, 1)


@dataclass
class Answers:
    """A Pipeline that applies every row, or none, and keeps what it was asked."""

    log: RunLog
    applies: bool = True
    loss: float = 2.0
    requests: list[EvaluationRequest] = field(default_factory=list)
    batches: list[TransitionBatch] = field(default_factory=list)
    metrics: list[MetricsBatch] = field(default_factory=list)

    async def evaluate(self, request: EvaluationRequest) -> Evaluation:
        self.requests.append(request)
        flipped = np.arange(request.settings) > 0
        loss, gain = np.where(flipped, self.loss / 2, self.loss), np.where(flipped, -1.0, 0.0)
        return Evaluation(loss, loss * 0 + 0.5, gain, gain - 0.1, gain + 0.1, 8)

    async def apply(
        self, batches: Sequence[TransitionBatch], metrics: Sequence[MetricsBatch]
    ) -> list[TransitionReceipt]:
        self.batches += batches
        self.metrics += metrics
        return [
            TransitionReceipt(
                b.layer_id,
                b.number,
                0,
                np.full(len(b.seed_ids), self.applies),
                np.zeros(len(b.seed_ids), np.uint8),
            )
            for b in reversed(batches)
        ]

    async def save(self) -> list[SegmentRef]:
        return [self.log.put_segment("stage0/host", b"weights", "safetensors")]


def spec(**given_: Any) -> CoordinatorSpec:
    values: dict[str, Any] = {
        "stages": 1,
        "epochs": 100,
        "batch_size": 8,
        "every_epochs": 100,
        "timeout_s": 5.0,
        "policy": PolicySettings(germinate_after=0, blueprint_id=3, strategy_id=0),
        "manager": LifecycleManager(minimum_epochs=MINIMA),
        "manifest": {"run": "fake", "config": {"seed": 1}},
    }
    return CoordinatorSpec(**{**values, **given_})


async def build(
    root: Root, progress: dict[str, object] | None = None, **given_: Any
) -> tuple[LifecycleCoordinator, Answers, EpochRecord]:
    coordinator = LifecycleCoordinator(spec(**given_), root)
    record = RunLog(root).open_epoch(None)
    answers = Answers(RunLog(root))
    await coordinator.setup(answers, progress, record)
    return coordinator, answers, record


@pytest.fixture
def root(request: pytest.FixtureRequest) -> Root:
    return Root.open(f"memory://{request.node.name}/run")


def report(epoch: int, *layers: TelemetryBatch, stage: int = 0, loss: float = 1.0) -> StageReport:
    return StageReport(stage, epoch, 4 * (epoch + 1), layers, (loss, loss + 1, loss, loss))


async def run_epoch(coordinator: LifecycleCoordinator, *reports: StageReport) -> EpochReport:
    for each in reports:
        await coordinator.ingest(each)
    return await coordinator.end_epoch(reports[0].epoch)


READY = {"local_loss": np.zeros(2, np.float32), "delta_ratio": np.zeros(2, np.float32)}

# ------------------------------------------------------------------ collecting


async def test_epoch_ends_when_every_stage_has_reported(root: Root) -> None:
    coordinator, *_ = await build(root, stages=3)
    ending = asyncio.create_task(coordinator.end_epoch(0))
    for stage in (2, 0):
        await coordinator.ingest(report(0, stage=stage, loss=float(stage)))
        await asyncio.sleep(0)
        assert not ending.done()
    await coordinator.ingest(report(0, stage=1, loss=1.0))
    done = await asyncio.wait_for(ending, 5)
    assert (done.epoch, done.step, done.losses) == (0, 4, (2.0, 3.0, 2.0, 2.0))


async def test_silent_stage_fails_the_run_by_name_of_the_epoch(root: Root) -> None:
    coordinator, *_ = await build(root, stages=2, timeout_s=0.05)
    with pytest.raises(RunFailed, match="1 of 2 stages reported epoch 0"):
        await run_epoch(coordinator, report(0))


async def test_report_of_an_older_epoch_does_not_count(root: Root) -> None:
    coordinator, *_ = await build(root, timeout_s=0.05)
    await run_epoch(coordinator, report(0))
    with pytest.raises(RunFailed, match="0 of 1 stages reported epoch 1"):
        await coordinator.end_epoch(1)


async def test_repeated_report_counts_once_and_the_newest_wins(root: Root) -> None:
    coordinator, *_ = await build(root, stages=2, timeout_s=0.05)
    await coordinator.ingest(report(0, stage=1, loss=5.0))
    with pytest.raises(RunFailed, match="1 of 2"):
        await run_epoch(coordinator, report(0, stage=1, loss=6.0))
    done = await run_epoch(coordinator, report(0, stage=0))
    assert done.losses[0] == 6.0


# ------------------------------------------------------------------ deciding


async def test_dormant_seeds_germinate_and_are_counted(root: Root) -> None:
    coordinator, answers, _ = await build(root)
    layers = [telemetry([S.DORMANT] * 2, epochs=1, layer_id=name) for name in ("a", "b")]
    done = await run_epoch(coordinator, report(0, *layers))
    assert [b.layer_id for b in answers.batches] == ["a", "b"]
    assert answers.batches[0].blueprint_id.tolist() == [3, 3]
    assert sorted(done.moves) == [
        (name, seed, "DORMANT", "GERMINATED") for name in "ab" for seed in (0, 1)
    ]
    assert done.transitions == 4
    assert done.seeds == {"a": {"GERMINATED": 2}, "b": {"GERMINATED": 2}}
    assert done.states_visited == ("DORMANT", "GERMINATED")


async def test_refused_rows_change_no_count(root: Root) -> None:
    coordinator, answers, _ = await build(root)
    answers.applies = False
    done = await run_epoch(coordinator, report(0, telemetry([S.DORMANT] * 2, epochs=1)))
    assert len(answers.batches) == 1
    assert (done.transitions, done.moves, done.states_visited) == (0, (), ("DORMANT",))
    assert done.seeds == {"layer": {"DORMANT": 2}}


async def test_seeds_that_are_due_are_judged_one_setting_each(root: Root) -> None:
    coordinator, answers, _ = await build(root)
    growing = telemetry([S.TRAINING, S.EVALUATING], epochs=5, **READY)
    done = await run_epoch(coordinator, report(0, growing))
    (request,) = answers.requests
    assert (request.split, request.settings) == ("gate", 3)
    assert request.alphas["layer"].tolist() == [[0, 1], [1, 1], [0, 0]]
    assert [m.seed_ids.tolist() for m in answers.metrics] == [[0, 1]]
    assert ("layer", 0, "TRAINING", "GRAFTING") in done.moves


async def test_request_numbers_never_repeat(root: Root) -> None:
    coordinator, answers, _ = await build(root)
    growing = telemetry([S.EVALUATING] * 40, epochs=5)
    for epoch in range(3):
        await run_epoch(coordinator, report(epoch, growing))
        await coordinator.evaluate("test")
    numbers = [request.number for request in answers.requests]
    assert len(numbers) == 9  # 40 seeds need two requests
    assert len(set(numbers)) == 9
    assert not {batch.number for batch in answers.batches} & set(numbers)


async def test_stability_needs_five_gate_losses(root: Root) -> None:
    coordinator, answers, _ = await build(root)
    for epoch in range(6):
        await run_epoch(coordinator, report(epoch, telemetry([S.EVALUATING], epochs=epoch + 1)))
    steady = [bool(metrics.valid[0] & 4) for metrics in answers.metrics]
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
    coordinator, answers, record = await build(root)
    await run_epoch(coordinator, report(0, telemetry([S.TRAINING] * 2)))
    growing = telemetry([S.TRAINING] * 2, epochs=5, epoch=1, **READY)
    done = await run_epoch(coordinator, report(1, growing))
    assert done.commit == record.next_seq
    assert answers.batches[-1].target.tolist() == [S.GRAFTING] * 2
    assert answers.batches[-1].checkpoint_id.tolist() == [record.next_seq] * 2


async def test_refused_grafting_forces_no_commit(root: Root) -> None:
    coordinator, answers, _ = await build(root)
    answers.applies = False
    growing = telemetry([S.TRAINING] * 2, epochs=5, **READY)
    assert (await run_epoch(coordinator, report(0, growing))).commit is None


async def test_run_goes_on_from_a_stored_progress(root: Root) -> None:
    coordinator, *_ = await build(root, epochs=1)
    await run_epoch(coordinator, report(0, telemetry([S.DORMANT] * 2, epochs=1)))
    stored = RunLog(root).read_commit(1)["coordinator"]
    resumed, answers, record = await build(root, progress=stored, epochs=2)
    done = await run_epoch(resumed, report(1, telemetry([S.GERMINATED] * 2, epochs=1)))
    assert (done.transitions, done.commit, record.next_seq) == (4, 2, 2)
    assert done.states_visited == ("DORMANT", "GERMINATED", "TRAINING")
    assert answers.requests[0].number > stored["number"] - 1


@given(
    st.builds(
        Progress,
        number=st.integers(0, 2**40),
        transitions=st.integers(0, 2**40),
        states_visited=st.lists(st.sampled_from([s.name for s in S]), unique=True),
        gate_losses=st.lists(st.floats(allow_nan=False), max_size=5),
        seeds=st.dictionaries(
            st.text(max_size=5), st.dictionaries(st.just("TRAINING"), st.just(1))
        ),
    )
)
def test_progress_goes_through_json_bit_for_bit(progress: Progress) -> None:
    stored = json.loads(json.dumps(progress.to_json(), allow_nan=False))
    assert Progress.from_json(stored) == progress


def test_progress_keeps_a_loss_that_is_not_a_number() -> None:
    stored = json.dumps(Progress(gate_losses=[math.nan, math.inf]).to_json(), allow_nan=False)
    first, second = Progress.from_json(json.loads(stored)).gate_losses
    assert math.isnan(first)
    assert second == math.inf


def test_progress_of_another_form_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a list"):
        Progress.from_json({"gate_losses": 1})
