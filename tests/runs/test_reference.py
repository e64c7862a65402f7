"""Runs through Ray actors against the same run in one process."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from esper_ray.actors.run_point import RunResult
from esper_ray.blueprints import registry
from esper_ray.config import RunConfig
from esper_ray.errors import ConfigError
from esper_ray.events.messages import EpochReport
from esper_ray.grafting import STRATEGIES
from esper_ray.planning import plan_run
from esper_ray.runtime import Runtime

ConfigMaker = Callable[..., RunConfig]

WHOLE_LIFE = (
    "DORMANT",
    "GERMINATED",
    "TRAINING",
    "GRAFTING",
    "STABILIZATION",
    "EVALUATING",
    "FINE_TUNING",
    "FOSSILIZED",
)


def run(config: RunConfig, *, local: bool) -> tuple[RunResult, list[EpochReport]]:
    reports: list[EpochReport] = []
    with Runtime(config, local=local) as runtime:
        result = runtime.fit("never", on_epoch=reports.append)
    return result, reports


def blended_epochs(reports: list[EpochReport]) -> int:
    """Epochs that began with a seed past its first epoch in GRAFTING, so with alpha above 0."""
    blended = ("STABILIZATION", "EVALUATING", "FINE_TUNING", "FOSSILIZED")
    return sum(
        any(state in blended for counts in report.seeds.values() for state in counts)
        for report in reports[:-1]
    )


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_actors_train_as_one_process_does_step_by_step(
    make_config: ConfigMaker, ray_cluster: str
) -> None:
    alone, alone_reports = run(make_config("local"), local=True)
    spread, spread_reports = run(make_config("actors", cluster__address=ray_cluster), local=False)
    here = [loss for report in alone_reports for loss in report.losses]
    there = [loss for report in spread_reports for loss in report.losses]
    assert len(here) == len(there) == alone.steps
    assert all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(here, there, strict=True))
    assert [r.moves for r in alone_reports] == [r.moves for r in spread_reports]
    assert alone.states_visited == spread.states_visited == WHOLE_LIFE
    assert blended_epochs(alone_reports) * 4 >= 20  # optimiser steps with alpha above 0
    assert alone.eval == pytest.approx(spread.eval, rel=1e-6)


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_more_micro_batches_in_flight_than_stages_change_no_loss(
    make_config: ConfigMaker, ray_cluster: str
) -> None:
    short = {"train__micro_batches": 8, "train__epochs": 9}
    alone, _ = run(make_config("local", **short), local=True)
    spread, _ = run(make_config("actors", cluster__address=ray_cluster, **short), local=False)
    assert alone.eval == pytest.approx(spread.eval, rel=1e-6)
    assert alone.transitions == spread.transitions > 0


def test_micro_batches_change_a_loss_by_rounding_only(make_config: ConfigMaker) -> None:
    losses = []
    for pieces in (1, 4):
        config = make_config(f"m{pieces}", train__micro_batches=pieces, train__epochs=9)
        _, reports = run(config, local=True)
        losses.append([loss for report in reports for loss in report.losses])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_two_runs_of_one_seed_are_equal_bit_for_bit(make_config: ConfigMaker) -> None:
    first, first_reports = run(make_config("a", train__epochs=12), local=True)
    second, second_reports = run(make_config("b", train__epochs=12), local=True)
    assert first.eval == second.eval
    assert [r.losses for r in first_reports] == [r.losses for r in second_reports]


def test_a_seed_learns_to_reproduce_its_chunk_and_is_grafted(make_config: ConfigMaker) -> None:
    config = make_config(
        seeds__objective="reconstruction", seeds__blueprint="autoencoder", train__epochs=40
    )
    gates = config.lifecycle.gates | {"reconstruction_loss_max": 0.5}
    lifecycle = config.lifecycle.model_copy(update={"gates": gates})
    result, _ = run(config.model_copy(update={"lifecycle": lifecycle}), local=True)
    assert "STABILIZATION" in result.states_visited


def run_both_ways(
    make_config: ConfigMaker, address: str, mine: dict[str, Any]
) -> tuple[RunResult, RunResult]:
    """In one process and through actors, which must move the same seeds, as far as a graft."""
    alone, here = run(make_config("local", **mine), local=True)
    spread, there = run(make_config("actors", cluster__address=address, **mine), local=False)
    assert [r.moves for r in here] == [r.moves for r in there]
    assert "STABILIZATION" in alone.states_visited
    assert alone.states_visited == spread.states_visited
    return alone, spread


@pytest.fixture
def factory_with_a_strategy() -> Iterator[str]:
    module = "tests.strategy_for_tests"
    yield f"{module}:two_stages"
    del STRATEGIES[sys.modules.pop(module).Square.strategy_id]


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_strategy_from_the_module_of_the_model_works_through_actors_too(
    make_config: ConfigMaker, ray_cluster: str, factory_with_a_strategy: str
) -> None:
    mine: dict[str, Any] = {
        "model__factory": factory_with_a_strategy,
        "seeds__grafting": {"strategy": "square_for_tests", "ramp_epochs": 6},
        "train__epochs": 14,
    }
    run_both_ways(make_config, ray_cluster, mine)


@pytest.fixture
def factory_with_a_blueprint() -> Iterator[str]:
    module = "tests.blueprint_for_tests"
    yield f"{module}:two_stages"
    sys.modules.pop(module, None)
    registry._BY_NAME.pop("adapter_of_a_user", None)


def test_a_blueprint_that_no_module_registers_is_refused_with_the_known_names(
    make_config: ConfigMaker,
) -> None:
    with pytest.raises(ConfigError, match="no blueprint is named 'adapter_of_a_user'") as caught:
        plan_run(make_config("run", seeds__blueprint="adapter_of_a_user"))
    assert "bottleneck" in caught.value.hint


@pytest.mark.parametrize("broken", [None, "heads", "shape"])
def test_a_blueprint_from_the_module_of_the_model_is_tried_at_planning(
    make_config: ConfigMaker, factory_with_a_blueprint: str, broken: str | None
) -> None:
    hidden = {None: 16, "heads": 15, "shape": 14}[broken]
    config = make_config(
        "run",
        model__factory=factory_with_a_blueprint,
        seeds__blueprint="adapter_of_a_user",
        seeds__hidden=hidden,
    )
    if broken is None:
        layers = plan_run(config).layers
        assert [layer.seed_parameters for layer in layers] == [4 * (8 * 16 + 16 + 16 * 8)] * 2
    else:
        message = {"heads": "15 is odd", "shape": r"returns \(16, 1\) for a chunk of \(16, 8\)"}
        with pytest.raises(ConfigError, match=message[broken]):
            plan_run(config)


def test_seeds_of_a_users_module_live_a_whole_life_and_resume(
    make_config: ConfigMaker, factory_with_a_blueprint: str
) -> None:
    mine = {"model__factory": factory_with_a_blueprint, "seeds__blueprint": "adapter_of_a_user"}
    whole, _ = run(make_config("whole", **mine), local=True)
    assert whole.states_visited == WHOLE_LIFE
    run(make_config("again", train__epochs=14, **mine), local=True)
    reports: list[EpochReport] = []
    with Runtime(make_config("again", **mine), local=True) as runtime:
        resumed = runtime.fit("auto", on_epoch=reports.append)
    assert reports[0].epoch == 14
    assert resumed.eval == whole.eval


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_blueprint_from_the_module_of_the_model_works_through_actors_too(
    make_config: ConfigMaker, ray_cluster: str, factory_with_a_blueprint: str
) -> None:
    mine: dict[str, Any] = {
        "model__factory": factory_with_a_blueprint,
        "seeds__blueprint": "adapter_of_a_user",
        "train__epochs": 16,
    }
    alone, spread = run_both_ways(make_config, ray_cluster, mine)
    assert alone.eval == pytest.approx(spread.eval, rel=1e-6)
