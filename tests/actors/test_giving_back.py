"""Rows that rolled back seeds get back: only those of the commit that they were grafted with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from esper_ray.actors import giving_back, persistence
from esper_ray.actors.journal import Journal
from esper_ray.errors import CheckpointNotFound
from esper_ray.events.log import Events, encode
from esper_ray.growth.stage import Stage
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.storage import Root, RunLog
from tests.actors.coordination import Layers
from tests.builders import metrics, stage_spec, telemetry, transitions, walk

LAYER = "model.0.hidden.0"


@pytest.fixture
def log(root: Root) -> RunLog:
    """A log with a commit, 1, at which seed 0 has just entered GRAFTING; seed 1 did so before."""
    log = RunLog(root, RunLog(root).open_epoch(None))
    stage = Stage(stage_spec())
    walk(stage, [0, 1, 2], S.TRAINING)
    for seed, seq in ((0, 1), (1, 0)):
        batch = transitions([seed], S.TRAINING, S.GRAFTING, layer_id=LAYER, checkpoint_id=seq)
        assert stage.apply(batch).applied.all()
    stage.record(replace(metrics([0], [[1.0, 0.5, 0.0, 2.0]], score=[-0.007]), layer_id=LAYER))
    segments = persistence.save_stage(stage, log)
    events = log.put_log(1, encode(Events.empty()), 0)
    log.commit(1, {"run": "one"}, segments, events)
    return log


async def roll_back(
    log: RunLog, seed: int, target: S = S.ROLLED_BACK, **seen: Any
) -> tuple[Layers, Journal, list[str]]:
    layers, journal = Layers(log, 1), Journal(0)
    batch = transitions([seed], S.GRAFTING, target, layer_id=LAYER)
    given = {"layer_id": LAYER, "checkpoint_id": np.full(5, 1, np.int32), **seen}
    now = telemetry([S.GRAFTING] * 5, **given)
    problems = await giving_back.give_back(layers, journal, log, now, batch, 40)
    return layers, journal, problems


async def test_a_rolled_back_seed_gets_its_row_back_and_it_is_logged(log: RunLog) -> None:
    layers, journal, problems = await roll_back(log, 0)
    assert problems == []
    [given] = layers.given_back
    assert given.columns().keys() == {
        "blueprint_id",
        "grafting_strategy",
        "evaluation_score",
        "performance_metrics",
        "metrics_valid",
    }
    columns = journal.drain().columns
    assert (columns["seed_id"].tolist(), columns["performance_delta"].tolist()) == ([0], [-0.007])


async def test_seeds_that_end_otherwise_get_nothing(log: RunLog) -> None:
    layers, journal, problems = await roll_back(log, 0, S.CULLED)
    assert (layers.given_back, problems, len(journal.drain())) == ([], [], 0)


@pytest.mark.parametrize(
    ("seed", "seen", "told"),
    [
        (1, {}, "did not enter GRAFTING there"),
        (2, {}, "did not enter GRAFTING there"),
        (4, {}, "it has no seed 4"),
        (0, {"checkpoint_id": np.full(5, 9, np.int32)}, "commit 9 cannot be used"),
        (0, {"generation": np.ones(5, np.int16)}, "another generation"),
    ],
)
async def test_a_commit_that_is_not_theirs_is_told(
    log: RunLog, seed: int, seen: dict[str, Any], told: str
) -> None:
    layers, journal, [problem] = await roll_back(log, seed, **seen)
    assert told in problem
    assert f"seeds {seed} keep" in problem
    assert (layers.given_back, len(journal.drain())) == ([], 0)


def test_an_unknown_commit_is_not_found(root: Root) -> None:
    with pytest.raises(CheckpointNotFound):
        giving_back.read_rows(RunLog(root), "layer", np.array([0]), 7)


@pytest.mark.parametrize("score", [0, 1, -1, 2**31 - 1, -(2**31), 123_456_789])
def test_a_score_goes_through_the_log_unchanged(score: int) -> None:
    assert int(np.rint(np.float64(np.int32(score) / 1000) * 1000)) == score
