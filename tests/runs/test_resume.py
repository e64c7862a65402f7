"""A run that is killed and resumed ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esper_ray.actors.persistence import read_losses, read_state
from esper_ray.config import RunConfig
from esper_ray.events.log import SCHEMA, EventKind
from esper_ray.storage import Root, RunLog, codec
from tests.runs.history import events_of, grow, newest, segments

LAYERS = ("reader.hidden", "predictor.hidden")


def train(config: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "esper_ray", "train", str(config), *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for success; returns what was written to stderr."""
    _, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    return err


def kill_while_grafting(process: subprocess.Popen[str]) -> str:
    """SIGKILL two epochs after the first seed entered GRAFTING; returns the last epoch's line."""
    assert process.stderr is not None
    seen = 0
    for line in process.stderr:
        seen += "GRAFTING" in line
        if seen == 3:
            process.send_signal(signal.SIGKILL)
            _, rest = process.communicate(timeout=30)
            return (line + rest).splitlines()[-1]
    raise AssertionError("the run ended before a seed was in GRAFTING")


def rollback_copy(log: RunLog, seq: int, layer: str, seed_id: int) -> dict[str, torch.Tensor]:
    """What commit `seq` holds for one seed to roll back to."""
    ref = segments(log.read_commit(seq))[f"layer/{layer}/rollback"]
    stored = codec.decode_tensors(log.read_segment(ref))
    row = stored["seed_id"].tolist().index(seed_id)
    return {name: value[row] for name, value in stored.items()}


def assert_same_copies(a: RunLog, b: RunLog, layer: str, ids_a: Any, ids_b: Any) -> None:
    """CHECKPOINT_ID may differ between runs, but names a checkpoint of equal content."""
    for seed_id, (seq_a, seq_b) in enumerate(zip(ids_a.tolist(), ids_b.tolist(), strict=True)):
        copy_a = rollback_copy(a, seq_a, layer, seed_id)
        copy_b = rollback_copy(b, seq_b, layer, seed_id)
        assert copy_a.keys() == copy_b.keys()
        assert all(torch.equal(copy_a[name], copy_b[name]) for name in copy_a)


def assert_same_runs(log_a: RunLog, log_b: RunLog, steps: int = 34 * 4) -> None:
    """Per-step losses, seed states, weights and moments of two finished runs, bit for bit."""
    assert read_losses(log_a) == read_losses(log_b)
    assert len(read_losses(log_a)) == steps
    parts_a, parts_b = segments(newest(log_a)), segments(newest(log_b))
    for layer in LAYERS:
        state_a, state_b = (
            read_state(log, parts, layer) for log, parts in ((log_a, parts_a), (log_b, parts_b))
        )
        ids_a, ids_b = state_a.pop("checkpoint_id"), state_b.pop("checkpoint_id")
        assert (ids_a > 0).all()
        assert_same_copies(log_a, log_b, layer, ids_a, ids_b)
        for name in state_a:
            np.testing.assert_array_equal(state_a[name], state_b[name], err_msg=name)
    grown = [f"layer/{layer}/{part}" for layer in LAYERS for part in ("weights", "grafting")]
    for name in ("stage0/host", "stage1/host", *grown):
        assert parts_a[name].sha256 == parts_b[name].sha256, name
    told_a, told_b = newest(log_a)["coordinator"], newest(log_b)["coordinator"]
    for name in ("transitions", "states_visited", "gate_losses", "seeds", "outcomes"):
        assert told_a[name] == told_b[name], name
    assert_same_events(log_a, log_b)


def assert_same_events(a: RunLog, b: RunLog) -> None:
    """All that was done; refusals are told at commits, so they may differ, as numbers may."""
    done = [k for k in EventKind if k not in (EventKind.REFUSAL, EventKind.FAULT)]
    events_a, events_b = events_of(a, *done).columns, events_of(b, *done).columns
    for name in SCHEMA.keys() - {"sequence", "checkpoint_id"}:
        np.testing.assert_array_equal(events_a[name], events_b[name], err_msg=name)


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_run_killed_while_grafting_resumes_bit_for_bit(
    write_config: Callable[..., Path], tmp_path: Path, ray_cluster: str
) -> None:
    ramp = {"strategy": "linear", "ramp_epochs": 12}
    address = {"cluster__address": ray_cluster, "seeds__grafting": ramp}
    whole = train(write_config("whole", **address))
    last_line = kill_while_grafting(train(write_config("cut", **address)))
    assert "GRAFTING" in last_line
    log_b = RunLog(Root.open(str(tmp_path / "cut")))
    done = int(last_line.split()[1].partition("/")[0])
    assert newest(log_b)["epoch"] < done  # what came after the last commit is lost and done again
    finish(whole)
    told = finish(train(write_config("cut", **address), "--resume", "auto"))
    assert "resuming" in told

    assert_same_runs(RunLog(Root.open(str(tmp_path / "whole"))), log_b)


@pytest.mark.parametrize(("strategy", "mode"), [("adaptive", "fixed"), ("linear", "performance")])
def test_a_run_cut_while_strategies_remember_the_past_resumes_bit_for_bit(
    make_config: Callable[..., RunConfig], strategy: str, mode: str
) -> None:
    selection = {"mode": mode, "improving_delta": 1e-4, "improving_epochs": 1, "cooldown_epochs": 2}
    grafting = {
        "strategy": strategy,
        "ramp_epochs": 6,
        "drift_threshold": 0.0145,
        "adaptive_drift": 0.015,
        "pause_epochs": 2,
        "selection": selection,
    }
    whole, *_ = grow(make_config("whole", seeds__grafting=grafting))
    cut, *_ = grow(make_config("cut", seeds__grafting=grafting, train__epochs=10))
    assert segments(newest(cut))[f"layer/{LAYERS[0]}/grafting"].rows > 0
    grow(make_config("cut", seeds__grafting=grafting), "auto")
    assert_same_runs(whole, cut)


def kill_after(process: subprocess.Popen[str], epoch: int) -> None:
    """SIGKILL as soon as the run reports that epoch."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch") and int(line.split()[1].partition("/")[0]) >= epoch:
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=30)
            return
    raise AssertionError(f"the run ended before epoch {epoch}")


@pytest.mark.soak
def test_a_run_killed_again_and_again_resumes_bit_for_bit(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    finish(train(write_config("whole"), "--local"))
    config = write_config("cut", storage__every_epochs=2)
    for epoch in (1, 4, 6, 9, 12, 13, 16, 19, 21, 24, 27, 30, 33):
        kill_after(train(config, "--local"), epoch)
    finish(train(config, "--local"))
    whole, cut = (RunLog(Root.open(str(tmp_path / name))) for name in ("whole", "cut"))
    assert_same_runs(whole, cut)


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_private_cluster_ends_with_its_run(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil  # type: ignore[import-untyped,unused-ignore]  # bundled in Ray

    mark = f"esper-test-{os.getpid()}"
    monkeypatch.setenv("ESPER_TEST_MARK", mark)
    told = finish(train(write_config("own", train__epochs=2)))
    assert "epoch    2/2" in told
    left = [p.info["name"] for p in psutil.process_iter(["name"]) if marked(p, mark)]
    assert left == []


def marked(process: Any, mark: str) -> bool:
    """Whether the process inherited this test's environment; exited ones did not."""
    import psutil

    if process.pid == os.getpid():
        return False
    try:
        return bool(process.environ().get("ESPER_TEST_MARK") == mark)
    except psutil.Error:
        return False
