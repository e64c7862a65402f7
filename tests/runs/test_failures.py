"""What ends a run early, and what a seed that fails gets back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from esper_ray.actors import placement
from esper_ray.actors.persistence import read_state
from esper_ray.config import RunConfig
from esper_ray.errors import RunFailed
from esper_ray.events.messages import EpochReport
from esper_ray.lifecycle import ExtendedLifecycle
from esper_ray.runtime import Runtime
from esper_ray.storage import RunLog, codec, manifest

ConfigMaker = Callable[..., RunConfig]


def test_a_seed_that_never_blends_in_gets_its_weights_back(make_config: ConfigMaker) -> None:
    always_paused = {"strategy": "drift_controlled", "ramp_epochs": 2, "drift_threshold": 1e-9}
    config = make_config(seeds__grafting=always_paused, train__epochs=18)
    with Runtime(config, local=True) as runtime:
        runtime.fit("never")
        log, layers = RunLog(runtime.root), list(runtime.plan.stage_of)
    parts = {ref.name: ref for ref in manifest.segments(log.read_commit(log.lineage()[0]))}
    for layer in layers:
        state = read_state(log, parts, layer)
        assert (state["lifecycle_state"] == ExtendedLifecycle.ROLLED_BACK).all()
        assert (state["parent_state"] == ExtendedLifecycle.GRAFTING).all()
        assert (state["alpha"] == 0).all()
        now, copy = (
            codec.decode_tensors(log.read_segment(parts[f"layer/{layer}/{part}"]))
            for part in ("weights", "rollback")
        )
        assert now.keys() == copy.keys()
        assert len(now["seed_id"]) == 4
        assert all(torch.equal(now[name], copy[name]) for name in now)
        assert now["w_out"].abs().max() > 0  # trained, not newborn


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_lost_actor_ends_the_run_and_says_how_to_go_on(
    make_config: ConfigMaker, ray_cluster: str
) -> None:
    import ray

    runtime = Runtime(make_config(cluster__address=ray_cluster, cluster__max_failures=0))

    def kill_one(report: EpochReport) -> None:
        if report.epoch == 1:
            ray.kill(runtime.actors[0].handle)

    with runtime, pytest.raises(RunFailed) as failed:
        runtime.fit("never", on_epoch=kill_one)
    assert "--resume auto" in failed.value.hint


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_coordinator_is_found_by_its_name_and_a_second_run_of_that_name_is_refused(
    make_config: ConfigMaker, ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(placement, "_NAME_FREE_S", 0.5)
    config = make_config(cluster__address=ray_cluster, train__epochs=2)
    with Runtime(config) as first, Runtime(make_config(cluster__address=ray_cluster)) as second:
        first.open()
        named: Any = ray.get_actor("esper/run/coordinator", namespace="esper")
        assert ray.get(named.ping.remote(), timeout=60) == 1
        with pytest.raises(RunFailed, match="a run named 'run' is at work"):
            second.open()
    with Runtime(config) as third:  # the name is free again
        third.open()


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_an_actor_that_hangs_within_a_step_is_replaced(
    make_config: ConfigMaker, ray_cluster: str, tmp_path: Path
) -> None:
    mark = tmp_path / "hang"
    config = make_config(
        "hanging",
        cluster__address=ray_cluster,
        cluster__step_timeout_s=20,
        cluster__answer_timeout_s=3,
        model__factory="tests.models_for_tests:sleeping",
        model__args={"mark": str(mark)},
        data__args={"window": 4},
        seeds__targets=["reader.hidden"],
        train__epochs=6,
    )
    told: list[str] = []
    epochs: list[int] = []

    def hang_once(report: EpochReport) -> None:
        epochs.append(report.epoch)
        if len(epochs) == 2:
            mark.touch()

    with Runtime(config, warn=told.append) as runtime:
        result = runtime.fit("never", on_epoch=hang_once)
    assert result.steps == 24
    assert epochs == [0, 1, 0, 1, 2, 3, 4, 5]
    assert not mark.exists()
    assert any("going on at epoch 0" in line for line in told)


def command(config: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "esper_ray", "train", str(config), *options]


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_full_cluster_is_waited_for_and_then_reported(
    write_config: Callable[..., Path], ray_cluster: str
) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    taken = placement_group([{"CPU": 3.0}])
    ray.get(taken.ready(), timeout=60)
    try:
        config = write_config("full", cluster__address=ray_cluster)
        done = subprocess.run(
            [*command(config), "--set", "cluster.wait_for_resources_s=2"],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    finally:
        remove_placement_group(taken)
    assert done.returncode == 6, done.stderr
    assert "need 2 CPU, cluster has 4 (1 free)" in done.stderr


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_ends_the_run_with_130(write_config: Callable[..., Path]) -> None:
    config = write_config("interrupted", train__epochs=5_000)
    process = subprocess.Popen(
        command(config, "--local"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    assert process.stderr is not None
    next(line for line in process.stderr if line.startswith("epoch"))
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "error: interrupted"
