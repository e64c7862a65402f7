"""The S3 server is killed while runs write to it: what was acknowledged is there afterwards."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper_ray.actors.persistence import read_losses
from esper_ray.bench.s3_server import S3Server
from esper_ray.config import load_config, parse_config
from esper_ray.events.messages import EpochReport
from esper_ray.runtime import Runtime
from esper_ray.storage import RunLog
from tests.cli.conftest import RUN_FILE
from tests.servers.fixtures import Place, s3_options
from tests.storage.stored_runs import Writer, check

pytestmark = pytest.mark.s3


@pytest.fixture
def mortal(weed_server: S3Server) -> Iterator[S3Server]:
    """The server, which runs again when the test is over, however it ends."""
    yield weed_server
    if weed_server._process is None:
        weed_server.start()


def kill_under_load(server: S3Server, kills: int, writers: int, seed: int) -> list[int]:
    """Kill and start the server again and again; acknowledged commits of each writer, checked."""
    place, dice = Place("s3://esper", s3_options(server.endpoint)), random.Random(seed)
    roots = [place.root(timeout_s=6.0) for _ in range(writers)]
    over = threading.Event()
    working = [Writer(RunLog(root)) for root in roots]

    def write(writer: Writer) -> None:
        writer.start()
        while not over.is_set():
            writer.commit(size=100_000)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in working]
    for thread in threads:
        thread.start()
    for _ in range(kills):
        time.sleep(dice.uniform(0.5, 2.0))
        server.kill()
        time.sleep(dice.uniform(0.0, 1.0))
        server.start()
    over.set()
    for thread in threads:
        thread.join()
    for writer, root in zip(working, roots, strict=True):
        check(writer, RunLog(root))
    return [len(writer.acknowledged) for writer in working]


def test_server_killed_twice_loses_no_acknowledged_commit(mortal: S3Server) -> None:
    assert min(kill_under_load(mortal, kills=2, writers=2, seed=3)) > 0


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_server_killed_twenty_times_loses_no_acknowledged_commit(mortal: S3Server) -> None:
    acknowledged = kill_under_load(mortal, kills=20, writers=4, seed=4)
    print(f"{sum(acknowledged)} acknowledged commits, none lost")
    assert min(acknowledged) > 20


@pytest.mark.soak
def test_run_that_may_warn_trains_on_while_the_server_is_away(
    mortal: S3Server, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(RUN_FILE)
    config = load_config(tmp_path / "run.yaml", ["train.epochs=8"])
    storage = {
        "url": f"s3://esper/away{time.time_ns()}",
        "options": s3_options(mortal.endpoint),
        "every_epochs": 1,
        "timeout_s": 0.6,
        "on_upload_error": "warn",
    }
    config = parse_config({**config.model_dump(mode="json"), "storage": storage})
    warned, commits = list[str](), dict[int, int | None]()

    def watch(report: EpochReport) -> None:
        commits[report.epoch] = report.commit
        if report.epoch == 1:
            mortal.kill()
        if report.epoch == 4:
            mortal.start()

    with Runtime(config, local=True, warn=warned.append) as runtime:
        result = runtime.fit("never", on_epoch=watch)
        log = RunLog(runtime.root)
        checkpoint = log.read_commit(log.lineage()[0])
    assert [commits[epoch] for epoch in (2, 3, 4)] == [None] * 3
    assert [epoch for epoch, commit in commits.items() if commit] == [0, 1, 5, 6, 7]
    assert sum("a checkpoint is not stored yet" in line for line in warned) == 3
    assert (result.steps, checkpoint["step"]) == (16, 16)
    losses = read_losses(log)
    assert sorted(losses) == list(range(16))  # every step's loss is stored, once
