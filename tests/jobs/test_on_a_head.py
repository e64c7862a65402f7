"""Jobs on a head that `ray start` started, with a token, from the command line and from S3."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from esper_ray.bench.s3_server import S3Server
from esper_ray.storage import Root, RunLog
from tests.cli.conftest import Outcome
from tests.jobs.head import Head, started_head, write_token
from tests.servers.processes import free_port

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(600)]

MODEL = """\
from collections import OrderedDict

from torch import nn

from esper_ray.models import StageFactory


def build():
    return nn.Sequential(nn.Embedding(256, 3), nn.Flatten(), layers())


def layers():
    parts = OrderedDict(hidden=nn.Linear(12, 16), active=nn.ReLU(), out=nn.Linear(16, 256))
    return nn.Sequential(parts)


def one_stage():
    return [StageFactory("model", build)]
"""
RUN_FILE = """\
run: headed
seed: 3
data: {args: {window: 4, cap_bytes: 60000}, batch_size: 16, evaluation_samples: 64}
model: {factory: "mymodel:one_stage"}
train: {epochs: 100000, micro_batches: 2}
seeds: {targets: ["*.hidden"], seeds_per_layer: 4, epoch_steps: 2, hidden: 4}
lifecycle: {germinate_after: 90000}
storage: {url: "s3://esper/headed", every_epochs: 5}
cluster: {wait_for_resources_s: 4}
"""

Command = Callable[..., Outcome]


@pytest.fixture(scope="module")
def head(weed_server: S3Server) -> Iterator[Head]:
    """One CPU, and the keys of the local S3 server in its environment, as a role would give."""
    options = weed_server.options
    keys = {
        "AWS_ACCESS_KEY_ID": options["key"],
        "AWS_SECRET_ACCESS_KEY": options["secret"],
        "AWS_ENDPOINT_URL_S3": weed_server.endpoint,
        "OMP_NUM_THREADS": "1",
    }
    with started_head(1, keys) as started:
        yield started


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the user has: a run file, a module, and things that must not travel."""
    (tmp_path / "run.yaml").write_text(RUN_FILE)
    (tmp_path / "mymodel.py").write_text(MODEL)
    (tmp_path / ".env").write_text("SECRET=1")
    (tmp_path / "id_rsa").write_text("key")
    return tmp_path


@pytest.fixture
def command(folder: Path, head: Head) -> Command:
    """Run a command as a process in that folder."""

    def run(*words: str, **env: str) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", "esper_ray", *words],
            cwd=folder,
            env={**head.env, **env},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


def until(look: Callable[[], bool], timeout_s: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not look():
        assert time.monotonic() < deadline, "it did not come in time"
        time.sleep(0.3)


def test_run_is_submitted_asked_stopped_and_resumed(command: Command, head: Head) -> None:
    at = ("--address", head.url)
    submitted = command("submit", "run.yaml", *at, "--json")
    assert submitted.code == 0, submitted.stderr
    job = json.loads(submitted.stdout)
    assert (job["run"], job["storage_url"]) == ("headed", "s3://esper/headed")
    assert re.fullmatch("[0-9a-f]{64}", job["config_sha256"])
    uploaded = [line.split()[0] for line in submitted.stderr.splitlines() if line[:2] == "  "]
    assert uploaded == ["mymodel.py", "run.yaml"]

    until(lambda: " saved #" in head.ask(f"/api/jobs/{job['job']}/logs")["logs"])
    assert " saved #" in command("logs", "headed", *at).stdout
    shown = json.loads(command("status", job["job"], *at, "--json").stdout)
    assert (shown["status"], shown["exit_code"]) == ("running", None)
    assert job["job"] in command("status", *at).stdout
    words = ("germinate", "--layer", "model.2.hidden", "--seed", "1", "--wait", "200")
    asked = command("request", "headed", *words, "--address", head.address)
    assert asked.code == 0, asked.stderr

    stopped = command("stop", "headed", *at, "--wait", "300")
    assert (stopped.code, stopped.stdout) == (0, f"{job['job']} succeeded\n"), stopped.stderr
    log = command("logs", job["job"], *at).stdout
    step = int(re.findall(r"checkpoint: s3://esper/headed@step=(\d+)", log)[-1])

    resumed = command(
        "submit", "run.yaml", *at, "--follow", "--set", f"train.epochs={step // 2 + 2}"
    )
    assert resumed.code == 0, resumed.stderr
    assert f"resuming s3://esper/headed at step {step}" in resumed.stderr
    assert f"checkpoint: s3://esper/headed@step={step + 4}" in resumed.stderr
    newest = json.loads(command("status", "headed", *at, "--json").stdout)
    assert (newest["job"], newest["exit_code"]) == (resumed.stdout.strip(), 0)


@pytest.mark.parametrize(
    ("run", "needs", "said"),
    [
        pytest.param(
            "no-gpu",
            ("cluster.gpus=1",),
            "error: need 1 GPU, cluster has 0 (0 free)",
        ),
        pytest.param(
            "no-cpu",
            ("model.factory=esper_ray.models:byte_mlp", "model.args={window: 4}"),
            "error: need 2 CPU, cluster has 1",
            marks=pytest.mark.soak,
        ),
    ],
)
def test_missing_resources_end_with_the_code_of_the_entrypoint(
    command: Command, head: Head, run: str, needs: tuple[str, ...], said: str
) -> None:
    changes = (*needs, f"run={run}", f"storage.url=s3://esper/{run}")
    words = [word for change in changes for word in ("--set", change)]
    done = command("submit", "run.yaml", "--address", head.url, "--follow", *words)
    assert done.code == 6, done.stderr
    assert said in done.stderr


def test_wrong_token_no_token_and_no_cluster_are_said_in_two_lines(
    command: Command, head: Head, tmp_path: Path
) -> None:
    at = ("status", "--address", head.url)
    wrong = write_token(tmp_path / "wrong")
    error, hint = command(*at, RAY_AUTH_TOKEN_PATH=str(wrong)).failed(5)
    assert error == f"error: {head.url} refuses the token of {wrong}"
    assert "RAY_AUTH_TOKEN_PATH" in hint
    error, hint = command(*at, RAY_AUTH_TOKEN_PATH="", HOME=str(tmp_path)).failed(5)
    assert error == f"error: {head.url} wants a token, and there is none here"
    error, _ = command(*at, RAY_AUTH_TOKEN_PATH=str(tmp_path / "none")).failed(5)
    assert "cannot be read" in error
    nowhere = f"http://127.0.0.1:{free_port()}"
    error, _ = command("status", "--address", nowhere).failed(5)
    assert error.startswith(f"error: no Ray job server answers at {nowhere}")


def test_unknown_job_is_not_found(command: Command, head: Head) -> None:
    error, _ = command("logs", "nobody", "--address", head.url).failed(3)
    assert error == f"error: {head.url} has no job of 'nobody'"


@pytest.mark.soak
def test_signal_lets_a_run_store_itself(command: Command, head: Head) -> None:
    at = ("--address", head.url)
    other = ("--set", "run=signalled", "--set", "storage.url=s3://esper/signalled")
    job = command("submit", "run.yaml", *at, *other).stdout.strip()
    until(lambda: "epoch " in head.ask(f"/api/jobs/{job}/logs")["logs"])
    stopped = command("stop", job, *at, "--now")
    assert (stopped.code, stopped.stdout) == (0, f"{job} stopped\n"), stopped.stderr
    assert "checkpoint: s3://esper/signalled@step=" in command("logs", job, *at).stdout
    assert json.loads(command("status", job, *at, "--json").stdout)["exit_code"] == 143


@pytest.mark.soak
def test_run_whose_head_dies_goes_on_where_it_is_submitted_again(folder: Path) -> None:
    store = folder / "store"
    words = [sys.executable, "-m", "esper_ray", "submit", "run.yaml", "--follow"]
    words += ["--set", f"storage.url={store}", "--address"]
    with started_head(1) as first:
        with subprocess.Popen(
            [*words, first.url],
            cwd=folder,
            env=dict(first.env),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as following:
            until(lambda: (store / "commits").is_dir() and any((store / "commits").iterdir()))
            first.kill()
            _, said = following.communicate(timeout=200)
        assert following.returncode == 5, said
        assert f"error: no Ray job server answers at {first.url}" in said
    log = RunLog(Root.open(str(store)))
    step = log.read_commit(log.lineage()[0])["step"]
    with started_head(1) as second:
        again = subprocess.run(
            [*words, second.url, "--set", f"train.epochs={step // 2 + 2}"],
            cwd=folder,
            env=dict(second.env),
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
    assert again.returncode == 0, again.stderr
    assert f"at step {step}" in again.stderr
