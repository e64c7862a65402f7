"""The S3 server is killed while runs write to it: what was acknowledged is there afterwards."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator

import pytest

from esper_ray.bench.s3_server import S3Server
from esper_ray.storage import RunLog
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
