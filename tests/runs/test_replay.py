"""The event log of a run leads to the state that the run has stored, whatever happened in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from esper_ray.actors.engines import LocalEngine
from esper_ray.actors.persistence import read_state
from esper_ray.config import RunConfig, parse_config
from esper_ray.events.log import EventKind
from esper_ray.events.messages import EpochReport
from esper_ray.planning import RunPlan
from esper_ray.runtime import Runtime
from esper_ray.storage import RunLog, SegmentRef
from tests.runs.conftest import short_run
from tests.runs.history import assert_log_replays, changes, events_of, grow, newest, segments

ConfigMaker = Callable[..., RunConfig]
STRATEGIES = ("linear", "drift_controlled", "momentum", "adaptive", "stability")
SENSITIVE = {
    "ramp_epochs": 6,
    "drift_threshold": 0.0145,  # some epochs of these runs drift more, others less
    "pause_epochs": 2,
    "adaptive_drift": 0.015,
    "check_every": 2,
    "loss_variance_max": 1e-6,
}
"""Settings under which every strategy has something to react to in a short run."""


@dataclass(frozen=True)
class Grown:
    """A finished run."""

    log: RunLog
    plan: RunPlan
    reports: list[EpochReport]


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Grown]:
    """A short run of a strategy, made once."""
    made: dict[str, Grown] = {}

    def run(strategy: str, mode: str = "fixed") -> Grown:
        name = f"{strategy}-{mode}"
        if name not in made:
            selection = {"mode": mode, "improving_delta": 0.0001, "improving_epochs": 1}
            selection["cooldown_epochs"] = 2
            grafting = {**SENSITIVE, "strategy": strategy, "selection": selection}
            values = short_run(tmp_path_factory.mktemp(name), seeds__grafting=grafting)
            made[name] = Grown(*grow(parse_config(values)))
        return made[name]

    return run


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_log_of_a_run_replays_to_its_state_bit_for_bit(
    grown: Callable[..., Grown], strategy: str
) -> None:
    run = grown(strategy)
    assert "GRAFTING" in run.reports[-1].states_visited
    assert_log_replays(run.log, run.plan)


def test_the_log_of_a_run_whose_seeds_switch_strategies_replays_too(
    grown: Callable[..., Grown],
) -> None:
    run = grown("linear", mode="performance")
    assert set(run.reports[-1].states_visited) >= {"GRAFTING", "STABILIZATION"}
    parts = segments(newest(run.log))
    used = {n for layer in run.plan.layers for n in strategies(run.log, parts, layer.layer_id)}
    assert used & {2, 1, 4}  # some seed has left `linear`, 0
    assert_log_replays(run.log, run.plan)


def strategies(log: RunLog, parts: dict[str, SegmentRef], layer: str) -> list[int]:
    found: list[int] = read_state(log, parts, layer)["grafting_strategy"].tolist()
    return found


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_the_log_of_a_run_on_actors_replays_too(make_config: ConfigMaker, ray_cluster: str) -> None:
    grafting = {**SENSITIVE, "strategy": "adaptive"}
    config = make_config(seeds__grafting=grafting, cluster__address=ray_cluster, train__epochs=20)
    log, plan, _ = grow(config, local=False)
    assert_log_replays(log, plan)


@pytest.mark.parametrize("cut", [9, 14])
def test_the_log_of_a_run_that_was_resumed_replays_too(
    make_config: ConfigMaker, grown: Callable[..., Grown], cut: int
) -> None:
    grafting = {**SENSITIVE, "strategy": "momentum", "selection": {"mode": "fixed"}}
    grow(make_config(seeds__grafting=grafting, train__epochs=cut))
    config = make_config(seeds__grafting=grafting)
    log, plan, reports = grow(config, "auto")
    assert reports[0].epoch == cut
    assert newest(log)["run_epoch"] == 2
    assert_log_replays(log, plan)


def test_the_log_of_a_run_that_was_rewound_replays_too(make_config: ConfigMaker) -> None:
    config = make_config(train__epochs=16, storage__every_epochs=3)
    log, *_ = grow(config)
    step = log.read_commit(log.lineage()[2])["step"]
    log, plan, _ = grow(config, f"{log.root.url}@step={step}")
    assert len(log.commit_numbers()) > len(log.lineage())
    assert_log_replays(log, plan)


def traces(run: Grown) -> dict[tuple[str, int], list[float]]:
    """Alpha by epoch of every seed in GRAFTING."""
    columns = events_of(run.log, EventKind.SIGNALS).columns
    found: dict[tuple[str, int], list[float]] = {}
    rows = zip(
        columns["layer"], columns["seed_id"].tolist(), columns["alpha"].tolist(), strict=True
    )
    for layer, seed, alpha in rows:
        found.setdefault((layer, seed), []).append(alpha)
    return found


def test_the_five_strategies_have_distinct_alpha_traces(grown: Callable[..., Grown]) -> None:
    by_strategy = {name: traces(grown(name)) for name in STRATEGIES}
    for seed in by_strategy["linear"]:
        seen = {name: tuple(found[seed]) for name, found in by_strategy.items()}
        assert len(set(seen.values())) == len(STRATEGIES), (seed, seen)
    ramp = pytest.approx([epoch / 6 for epoch in range(1, 7)])
    assert all(trace == ramp for trace in by_strategy["linear"].values())


class Poison:
    """Makes one seed's gradients infinite from some epoch on, and replants it once it is culled."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def __call__(self, runtime: Runtime, report: EpochReport) -> None:
        if report.epoch == self.epoch:
            assert isinstance(runtime._engine, LocalEngine)
            trainers = runtime._engine._pipeline.stages[0].trainers
            with torch.no_grad():
                trainers["reader.hidden"].layer.bank.weights["w_out"][1] = torch.inf
        if ("reader.hidden", 1, "TRAINING", "CULLED") in report.moves:
            runtime.request("replant", "reader.hidden", [1])


def test_the_log_of_a_seed_that_failed_and_was_replanted_replays_too(
    make_config: ConfigMaker,
) -> None:
    config = make_config(lifecycle__replanting=True, train__epochs=16)
    log, plan, _ = grow(config, listen=Poison(epoch=4))
    assert changes(log, "reader.hidden", 1)[2:4] == [("ERROR", "CULLED"), ("REPLANT", "DORMANT")]
    errors = events_of(log, EventKind.ERRORS).columns["errors"].tolist()
    assert min(errors) > 0
    assert_log_replays(log, plan)
