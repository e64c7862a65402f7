"""Random kills of actors, coordinator, nodes and driver: the run ends as if there had been none."""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from esper_ray.config import parse_config
from esper_ray.events.log import EventKind, Events, decode
from esper_ray.planning import RunPlan
from esper_ray.storage import Root, RunCheckpoints, RunLog
from tests.chaos.nodes import COORDINATOR, LAYER, Nodes, kill, nodes_of
from tests.chaos.trainer import Trainer
from tests.runs.conftest import short_run
from tests.runs.history import assert_log_replays, grow
from tests.runs.test_resume import assert_same_runs

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

EPOCHS = 60
SEED = int(os.environ.get("ESPER_CHAOS_SEED", "1"))
KINDS = ("actor", "coordinator", "node", "driver", "hang")
RESUMED_S = 10.0
"""Time from an actor's kill to the next step, as a median on a quiet machine."""


def config_at(path: Path, address: str, name: str = "chaos") -> Path:
    slow = {"strategy": "linear", "ramp_epochs": 14}
    minima = {"TRAINING": 12, "GRAFTING": 3, "STABILIZATION": 4, "EVALUATING": 4}
    values = short_run(
        path / name,
        train__epochs=EPOCHS,
        seeds__grafting=slow,
        lifecycle__minimum_epochs=minima | {"FINE_TUNING": 5},
        storage__every_epochs=3,
        cluster__address=address,
        cluster__answer_timeout_s=5,
        cluster__max_failures=20,
    )
    values["run"] = "chaos"
    where = path / f"{name}.yaml"
    where.write_text(yaml.safe_dump(values))
    return where


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with nodes_of(3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunLog, RunPlan]:
    """The same run without a kill, in this process."""
    values = yaml.safe_load(config_at(tmp_path_factory.mktemp("whole"), "local").read_text())
    log, plan, _ = grow(parse_config(values))
    return log, plan


def strike(kind: str, nodes: Nodes, trainer: Trainer, dice: random.Random) -> float:
    """Kill or stop one part of the run, and put back what it needs to go on; when that was."""
    if kind == "node":
        before = time.monotonic()
        nodes.kill_node(nodes.node_of(LAYER))
        nodes.add()
        return before
    before = time.monotonic()
    if kind == "driver":
        trainer.kill()
        trainer.start()
    elif kind == "hang":
        dice.choice(nodes.workers(LAYER)).send_signal(signal.SIGSTOP)
    else:
        kill(dice.choice(nodes.workers(LAYER if kind == "actor" else COORDINATOR)))
    return before


def check_stored(url: Path, plan: RunPlan) -> None:
    """The newest commit is whole, its states valid and those that its log leads to."""
    log = RunLog(Root.open(str(url)))
    if not (history := log.lineage()):
        return
    newest = history[0]
    assert RunCheckpoints(log).verify(newest) == []
    assert_log_replays(log, plan, newest)
    parts = [(seq, decode(log.read_log(ref))) for seq, ref in log.log_parts(newest)]
    events = Events.concatenate([part for _, part in parts])
    columns = events.columns
    assert (np.diff(columns["sequence"].astype(np.int64)) >= 0).all()
    moved = np.isin(columns["kind"], [EventKind.TRANSITION, EventKind.REPLANT])
    rows = events.take(moved).columns
    names = ("layer", "seed_id", "generation", "epoch")
    told = list(zip(*(list(rows[name]) for name in names), strict=True))
    assert len(told) == len(set(told)), "a transition is in the log twice"


def chaos(
    nodes: Nodes, path: Path, undisturbed: tuple[RunLog, RunPlan], kinds: list[str], seed: int
) -> dict[str, list[float]]:
    """Train with these kills at random moments; seconds from each kill to the next epoch."""
    print(f"chaos seed {seed}: {kinds}")
    whole, plan = undisturbed
    dice = random.Random(seed)
    targets = sorted(dice.sample(range(2, EPOCHS - 8), len(kinds)))
    took: dict[str, list[float]] = defaultdict(list)
    trainer = Trainer(config_at(path, nodes.address))
    try:
        since = 0.0
        for kind, epoch in zip(kinds, targets, strict=True):
            trainer.wait_for_epoch(epoch, since)
            time.sleep(dice.uniform(0, 0.3))
            assert trainer.process.poll() is None, f"the run ended before a kill\n{trainer.told()}"
            killed = strike(kind, nodes, trainer, dice)
            since = trainer.wait_for_line("resuming" if kind == "driver" else "going on", killed)
            took[kind].append(trainer.wait_for_epoch(1, since) - killed)
            check_stored(path / "chaos", plan)
        trainer.finish()
    finally:
        trainer.close()
    broken = RunLog(Root.open(str(path / "chaos")))
    check_stored(path / "chaos", plan)
    assert_same_runs(whole, broken, steps=EPOCHS * 4)
    return took


def report(took: dict[str, list[float]]) -> None:
    for kind, seconds in sorted(took.items()):
        middle, worst = statistics.median(seconds), max(seconds)
        print(f"{kind}: {len(seconds)} kills, median {middle:.1f} s, at most {worst:.1f} s")


@pytest.mark.timeout(900)
def test_a_run_survives_kills_of_every_kind(
    nodes: Nodes, tmp_path: Path, undisturbed: tuple[RunLog, RunPlan]
) -> None:
    kinds = ["actor"] * 4 + ["coordinator"] * 2 + ["node", "driver", "hang"]
    random.Random(SEED).shuffle(kinds)
    took = chaos(nodes, tmp_path, undisturbed, kinds, SEED)
    report(took)
    # Starting a process takes its share of the machine: processes that wait for a core count.
    crowd = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    assert statistics.median(took["actor"]) < RESUMED_S * crowd


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_node_that_is_away_and_comes_back_has_no_say(
    nodes: Nodes, tmp_path: Path, undisturbed: tuple[RunLog, RunPlan]
) -> None:
    whole, plan = undisturbed
    trainer = Trainer(config_at(tmp_path, nodes.address))
    try:
        trainer.wait_for_epoch(8)
        away = nodes.node_of(LAYER)
        stopped, since = nodes.stop_node(away), time.monotonic()
        since = trainer.wait_for_line("going on", since)
        trainer.wait_for_epoch(10, since)
        for process in stopped:
            process.send_signal(signal.SIGCONT)
        trainer.finish()
    finally:
        trainer.close()
        nodes.kill_node(away)
        nodes.add()
    check_stored(tmp_path / "chaos", plan)
    assert_same_runs(whole, RunLog(Root.open(str(tmp_path / "chaos"))), steps=EPOCHS * 4)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", range(10))
def test_a_run_survives_again_and_again(
    nodes: Nodes, tmp_path: Path, undisturbed: tuple[RunLog, RunPlan], number: int
) -> None:
    dice = random.Random(SEED + 100 + number)
    kinds = [*KINDS, *dice.choices(KINDS, weights=(5, 3, 1, 1, 1), k=6)]
    dice.shuffle(kinds)
    report(chaos(nodes, tmp_path, undisturbed, kinds, SEED + 100 + number))
