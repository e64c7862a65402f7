"""A network that fails between a writer and a real S3 server: no commit is lost or doubled."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator

import pytest

from esper_ray.bench.s3_server import S3Server
from esper_ray.errors import FencedError, StorageUnavailable
from esper_ray.storage import RunLog
from esper_ray.storage.filesystem import Root
from tests.servers.fault_proxy import Fault, FaultProxy
from tests.servers.fixtures import Place, s3_options
from tests.storage.stored_runs import Writer, check, insist

pytestmark = pytest.mark.s3
FAULTS = [fault for fault in Fault if fault is not Fault.NONE]


@pytest.fixture
def proxy(weed_server: S3Server) -> Iterator[FaultProxy]:
    proxy = FaultProxy(weed_server.ports["s3"], stall_s=1.2)
    yield proxy
    proxy.close()


def through(proxy: FaultProxy, root: Root, timeout_s: float = 2.4) -> Root:
    """The same prefix as `root`, reached through the proxy."""
    return Root.open(root.url, s3_options(proxy.endpoint), timeout_s=timeout_s)


def test_every_fault_at_a_manifest_is_survived(proxy: FaultProxy, weed: Place) -> None:
    root = weed.root()
    writer = Writer(RunLog(through(proxy, root)))
    writer.start()
    for fault in FAULTS:
        with proxy.once(fault, "PUT", "/commits/"):
            writer.commit()
        assert proxy.fired[fault] == 1
    assert list(writer.acknowledged) == list(range(1, len(FAULTS) + 1))
    check(writer, RunLog(root))


@pytest.mark.parametrize("fault", [Fault.TRUNCATE, Fault.ERROR, Fault.STALL_AFTER, Fault.SLOW])
def test_fault_while_reading_is_survived(proxy: FaultProxy, weed: Place, fault: Fault) -> None:
    root = weed.root()
    root.create("x", bytes(range(256)) * 64)
    with proxy.once(fault, "GET", "/x"):
        assert through(proxy, root).read("x", 1 << 20) == bytes(range(256)) * 64
    assert proxy.fired[fault] == 1


def test_store_that_says_nothing_delays_a_commit_by_its_bound_only(
    proxy: FaultProxy, weed: Place
) -> None:
    root = weed.root()
    log = RunLog(through(proxy, root, timeout_s=0.9))
    insist(lambda: log.open_epoch(None))
    proxy.stall_s, proxy.choose = 30.0, lambda *_: Fault.STALL_AFTER
    began = time.monotonic()
    with pytest.raises(StorageUnavailable, match=r"cannot \w+ s3://esper/") as caught:
        log.commit(1, {"step": 10}, [])
    assert time.monotonic() - began < 2 * 0.9 + 1.5
    assert "tried for 0.9 s" in caught.value.hint


def test_answer_that_comes_after_another_writer_began_is_no_commit_of_ours(
    proxy: FaultProxy, weed: Place
) -> None:
    root = weed.root()
    log = RunLog(through(proxy, root))
    log.open_epoch(None)
    RunLog(root).open_epoch(None)
    with proxy.once(Fault.DROP_RESPONSE, "HEAD", "/epochs/"), pytest.raises(FencedError):
        log.commit(1, {"step": 10}, [])
    assert root.names("commits") == []


def storm(proxy: FaultProxy, seed: int, share: float) -> None:
    """From now on a share of all requests meets a fault, any of them."""
    dice, lock = random.Random(seed), threading.Lock()

    def choose(method: str, path: str) -> Fault:
        with lock:
            return dice.choice(FAULTS) if dice.random() < share else Fault.NONE

    proxy.choose = choose


def test_run_in_a_storm_of_faults_keeps_every_commit_once(proxy: FaultProxy, weed: Place) -> None:
    root = weed.root()
    writer = Writer(RunLog(through(proxy, root)))
    storm(proxy, seed=5, share=0.15)
    writer.start()
    until = time.monotonic() + 5
    while time.monotonic() < until:
        writer.commit()
    check(writer, RunLog(root))
    assert sum(proxy.fired[fault] for fault in FAULTS) > 3


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_four_runs_in_a_long_storm_with_stalls_of_ten_seconds(
    weed_server: S3Server, weed: Place
) -> None:
    proxy = FaultProxy(weed_server.ports["s3"], stall_s=10.0)
    storm(proxy, seed=11, share=0.1)
    roots = [weed.root() for _ in range(4)]
    writers = [Writer(RunLog(through(proxy, root, timeout_s=30.0))) for root in roots]
    until = time.monotonic() + 300

    def write(writer: Writer) -> None:
        writer.start()
        while time.monotonic() < until:
            writer.commit()

    threads = [threading.Thread(target=write, args=(writer,)) for writer in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    proxy.close()
    assert {fault: proxy.fired[fault] > 0 for fault in FAULTS} == dict.fromkeys(FAULTS, True)
    commits = sum(len(writer.acknowledged) for writer in writers)
    print(f"{commits} commits acknowledged through {sum(proxy.fired[f] for f in FAULTS)} faults")
    for writer, root in zip(writers, roots, strict=True):
        assert len(writer.acknowledged) > 5
        check(writer, RunLog(root))
