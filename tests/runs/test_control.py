"""Runs that people pause, let go on, stop and ask things of, from this process and from others."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from esper_ray.actors.stopping import Wish
from esper_ray.config import RunConfig
from esper_ray.events.messages import EpochReport
from esper_ray.runtime import Runtime
from esper_ray.storage import Root, RunLog
from tests.runs.history import assert_log_replays, changes, grow, newest, segments

ConfigMaker = Callable[..., RunConfig]
LAYER = "reader.hidden"


def fit(config: RunConfig, wishes: dict[int, Wish], resume: str = "never") -> Any:
    """Run with wishes after given epochs."""
    with Runtime(config, local=True) as runtime:

        def on_epoch(report: EpochReport) -> None:
            if report.epoch in wishes:
                runtime._engine.wish(wishes[report.epoch])

        return runtime.fit(resume, on_epoch=on_epoch)


def test_a_stopped_run_is_stored_and_goes_on_as_if_it_had_not_been(
    make_config: ConfigMaker,
) -> None:
    result = fit(make_config("cut"), {9: Wish.STOP})
    assert (result.status, result.steps, result.eval) == ("stopped", 44, {})
    assert result.checkpoint.endswith("@step=44")
    cut, plan, _ = grow(make_config("cut"), "auto")
    whole, *_ = grow(make_config("whole"))
    for name, ref in segments(newest(whole)).items():
        if name.startswith("stage") or name.endswith("weights"):
            assert segments(newest(cut))[name].sha256 == ref.sha256, name
    assert_log_replays(cut, plan)


def test_a_stop_in_the_last_epoch_finds_a_complete_run(make_config: ConfigMaker) -> None:
    result = fit(make_config(train__epochs=3), {2: Wish.STOP})
    assert result.status == "completed"
    assert result.eval["samples"] > 0


def test_a_paused_run_is_stored_and_waits_until_it_may_go_on(make_config: ConfigMaker) -> None:
    config = make_config(train__epochs=4)
    with Runtime(config, local=True) as runtime:
        seen: list[tuple[int, int | None]] = []

        def on_epoch(report: EpochReport) -> None:
            seen.append((report.epoch, report.commit))
            if report.epoch == 0:
                runtime._engine.wish(Wish.PAUSE)

        polls = iter([Wish.PAUSE, Wish.PAUSE, Wish.RUN])
        look = runtime._engine.wish

        def wait(wish: Wish | None = None) -> Wish:
            return look(wish or next(polls))

        runtime._engine.wish = wait  # type: ignore[method-assign]
        began = time.monotonic()
        assert runtime.fit("never", on_epoch=on_epoch).status == "completed"
        assert time.monotonic() - began > 0.6
    assert seen == [(0, None), (1, 1), (2, None), (3, 2)]


@pytest.mark.parametrize("paused", [False, True])
def test_a_signal_ends_a_run_at_its_next_boundary_where_it_is_stored(
    make_config: ConfigMaker, paused: bool
) -> None:
    def on_epoch(report: EpochReport) -> None:
        if report.epoch == 1:
            if paused:
                runtime._engine.wish(Wish.PAUSE)
                threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            else:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with Runtime(make_config(train__epochs=50), local=True) as runtime:
        result = runtime.fit("never", on_epoch=on_epoch)
    assert (result.status, result.steps) == ("terminated", 12)
    assert signal.getsignal(signal.SIGTERM) is before


# ------------------------------------------------------------------ by the command line


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "esper_ray", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )


def run(*words: str, code: int = 0) -> str:
    """Run a command to its end; what it printed, errors last."""
    process = start(*words)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, (out, err)
    return out + err


class Lines:
    """The lines that a process writes to stderr, as they come."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.seen: list[str] = []
        assert process.stderr is not None
        self._stream = process.stderr
        self._process, self._thread = process, threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        self.seen.extend(iter(self._stream.readline, ""))

    def wait_for(self, pattern: str, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not any(re.search(pattern, line) for line in list(self.seen)):
            assert time.monotonic() < deadline, self.seen
            time.sleep(0.05)

    def end(self) -> str:
        """Wait for the end of the process; what it printed on stdout."""
        assert self._process.stdout is not None
        with self._process.stdout, self._stream:
            out = self._process.stdout.read()
            self._process.wait(timeout=60)
            self._thread.join(timeout=60)
        return out

    @property
    def epochs(self) -> int:
        return sum(line.startswith("epoch") for line in self.seen)


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.timeout(400)
def test_people_steer_a_run_on_a_cluster_by_commands(
    write_config: Callable[..., Path], tmp_path: Path, ray_cluster: str
) -> None:
    given = {"cluster__address": ray_cluster, "lifecycle__germinate_after": 100_000}
    config = write_config("steered", **given, train__epochs=100_000, storage__every_epochs=1000)
    at = ("steered", "--address", ray_cluster)
    process = start("train", str(config), "--json")
    try:
        lines = Lines(process)
        lines.wait_for("^epoch    2/")

        asked = ("--layer", LAYER, "--seed", "0", "--seed", "9", "--wait", "60")
        told = run("request", at[0], "germinate", *asked, *at[1:], code=1)
        assert f"{LAYER} seed 0: accepted" in told
        assert f"{LAYER} seed 9: the layer has no seed of that id" in told
        quick = json.loads(
            run("request", at[0], "cull", "--layer", LAYER, "--seed", "1", "--json", *at[1:])
        )
        assert quick == {"run": "steered", "request": 2, "answers": None}

        assert "pauses at its next" in run("pause", *at)
        lines.wait_for("saved #2")  # the first was after the request
        held = lines.epochs
        time.sleep(1.0)
        assert lines.epochs == held
        assert "goes on" in run("resume", *at)
        lines.wait_for(f"^epoch +{held + 3}/")

        assert json.loads(run("stop", *at, "--wait", "60", "--json")) == {
            "run": "steered",
            "wish": "stop",
            "ended": True,
        }
        out = lines.end()
    finally:
        process.kill()
    assert process.returncode == 0
    result = json.loads(out)
    assert result["status"] == "stopped"
    assert result["steps"] == 4 * lines.epochs

    log = RunLog(Root.open(str(tmp_path / "steered")))
    assert newest(log)["step"] == result["steps"]
    assert changes(log, LAYER, 0)[0] == ("USER", "GERMINATED")
    again = ("--set", f"train.epochs={lines.epochs + 1}", "--json")
    assert (
        json.loads(run("train", str(config), *again).partition("\n}")[0] + "\n}")["steps"]
        == result["steps"] + 4
    )
    gone = run("pause", *at, code=3)
    assert "error: no run named 'steered' is at work on the cluster" in gone


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["pause", "some", "--address", "127.0.0.1:1"], 5, "no Ray cluster answers"),
        (["resume", "some", "--address", "local"], 2, "cannot be joined"),
        (["stop", "some", "--address", "nowhere"], 5, "is not HOST:PORT"),
        (
            ["request", "some", "explode", "--layer", "x", "--seed", "1"],
            2,
            "no action is named 'explode'",
        ),
        (["stop", "memory://nothing/here", "--address", "127.0.0.1:1"], 3, "no run is stored"),
    ],
)
def test_what_cannot_be_reached_has_its_exit_code(
    words: Sequence[str], code: int, told: str
) -> None:
    from click.testing import CliRunner

    from esper_ray.cli import main

    result = CliRunner().invoke(main, list(words))
    assert result.exit_code == code, result.output
    assert told in result.stderr
    assert "hint: " in result.stderr


def test_a_terminated_command_says_so_by_its_exit_code(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config("ended", train__epochs=100_000)
    process = start("train", str(config), "--local")
    try:
        lines = Lines(process)
        lines.wait_for("^epoch    3/")
        process.send_signal(signal.SIGTERM)
        out = lines.end()
    finally:
        process.kill()
    assert process.returncode == 143
    assert ", terminated" in out.splitlines()[0]
    assert newest(RunLog(Root.open(str(tmp_path / "ended"))))["epoch"] == lines.epochs
