"""What the example's settings lead to, and what a useless seed must not reach."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from esper_ray.config import RunConfig, load_config
from esper_ray.events.log import EventKind
from esper_ray.events.messages import EpochReport
from esper_ray.lifecycle import ExtendedLifecycle
from tests.runs.history import events_of, grow

ConfigMaker = Callable[..., RunConfig]
EXAMPLE = Path(__file__).parents[2] / "examples" / "stdlib_lm.yaml"


@pytest.mark.slow
def test_a_drift_controlled_seed_of_the_example_pauses_and_reaches_alpha_one(
    tmp_path: Path,
) -> None:
    config = load_config(EXAMPLE, [f"storage.url={tmp_path}", "train.epochs=60"])
    assert config.seeds.grafting.strategy == "drift_controlled"
    log, *_ = grow(config)
    signals = events_of(log, EventKind.SIGNALS)
    paused, blended = set(), set()
    for layer, seed, drift, alpha in zip(
        *(signals.columns[name] for name in ("layer", "seed_id", "weight_drift", "alpha")),
        strict=True,
    ):
        if drift > config.seeds.grafting.drift_threshold:
            paused.add((layer, seed))
        if alpha == 1.0:
            blended.add((layer, seed))
    assert paused & blended


def targets(reports: list[EpochReport]) -> list[str]:
    return [target for report in reports for *_, target in report.moves]


def test_a_no_op_seed_beside_a_learning_host_is_culled_in_evaluating(
    make_config: ConfigMaker,
) -> None:
    _, _, reports = grow(make_config(seeds__lr=0.0, lifecycle__gates={"inconclusive_epochs": 6}))
    assert reports[-1].gate_loss < 0.8 * reports[0].gate_loss  # the host did learn
    assert "FOSSILIZED" not in targets(reports)
    assert targets(reports).count("CULLED") == 8


def test_a_no_op_seed_let_through_to_fine_tuning_is_never_fossilized(
    make_config: ConfigMaker,
) -> None:
    config = make_config(seeds__lr=0.0, lifecycle__fine_tuning_timeout=8)
    assert config.lifecycle.gates["improvement_min"] == 0.0  # the laxest threshold there is
    _, _, reports = grow(config)
    assert targets(reports).count("FINE_TUNING") == 8
    assert "FOSSILIZED" not in targets(reports)


@pytest.mark.soak
@pytest.mark.ray
def test_the_example_grows_seeds_through_actors_that_are_kept(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "esper_ray", "train", str(EXAMPLE), "--json"]
    done = subprocess.run(
        [*command, "--resume", "never", "--set", f"storage.url={tmp_path}"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["steps"] == 1600
    assert found["states_visited"] == [state.name for state in list(ExtendedLifecycle)[:8]]
    assert sum(counts.get("FOSSILIZED", 0) for counts in found["seeds"].values()) >= 1
    assert done.stderr.count("\nepoch ") == 100
