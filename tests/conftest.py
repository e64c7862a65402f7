"""Shared fixtures: a private Ray cluster, started once and only for the tests that ask for it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

pytest_plugins = ["tests.servers.fixtures"]

NAMESPACE = "esper-tests"
Pids = dict[int, float]  # process id -> creation time, so that a reused id is never signalled


def _ray_demands_tokens() -> bool:
    major, minor, *_ = importlib.metadata.version("ray").split(".")
    return (int(major), int(minor)) >= (2, 60)


def pytest_configure(config: pytest.Config) -> None:
    """Set what Ray reads when it is first imported; subprocesses inherit it."""
    hypothesis.settings.register_profile("esper", deadline=None)  # no test is one of speed
    hypothesis.settings.load_profile("esper")
    env = {
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's coming default, asked for by the warning that it prints otherwise.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    if not torch.cuda.is_available():
        env["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
    if _ray_demands_tokens():
        folder = Path(tempfile.mkdtemp(prefix="esper-tests-"))
        config.add_cleanup(lambda: shutil.rmtree(folder))
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    for name, value in env.items():
        patch.setenv(name, value)


def _start(ray: Any) -> None:
    for attempt in (1, 2):  # a raylet gets 30 s to start, too little on a loaded machine
        try:
            ray.init(
                address="local",
                num_cpus=4,
                include_dashboard=False,
                namespace=NAMESPACE,
                log_to_driver=False,
            )
        except Exception:
            ray.shutdown()
            if attempt == 2:
                raise
        else:
            return


def _cluster_pids(session_dir: str) -> Pids:
    """This process's children that serve `session_dir`, and all that those have started."""
    import psutil  # bundled in Ray

    found: Pids = {}
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(session_dir in word for word in child.cmdline()):
                members = [child, *child.children(recursive=True)]
                found.update({p.pid: p.create_time() for p in members})
    return found


def _alive(pids: Pids) -> list[int]:
    import psutil

    alive = []
    for pid, created in pids.items():
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(pid)
    return alive


def _wait_for_end(pids: Pids, timeout_s: float) -> list[int]:
    deadline = time.monotonic() + timeout_s
    while (alive := _alive(pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """Address (127.0.0.1:port) of a Ray cluster of four CPUs; a subprocess may join it."""
    import ray

    _start(ray)
    node = ray._private.worker.global_worker.node
    assert node is not None
    session_dir = node.get_session_dir_path()
    try:
        yield f"127.0.0.1:{ray.get_runtime_context().gcs_address.rpartition(':')[2]}"
    finally:
        pids = _cluster_pids(session_dir)
        ray.shutdown()
        pids |= _cluster_pids(session_dir)
        for pid in _wait_for_end(pids, timeout_s=5):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert not _wait_for_end(pids, timeout_s=10), "a Ray process of this test run outlived it"


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Heard by what a test starts, even if these tests are a background job that ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
