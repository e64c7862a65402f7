"""A head of Ray that a test starts by `ray start`, with a token, on ports of 127.0.0.1."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.servers.processes import free_port

ROOT = Path(__file__).parents[2]
_START_S = 90.0


@dataclass(frozen=True)
class Head:
    """Where a head listens, and the environment in which clients may reach it."""

    pid: int
    port: int
    dashboard: int
    folder: Path
    env: Mapping[str, str]

    @property
    def url(self) -> str:
        """Its job server."""
        return f"http://127.0.0.1:{self.dashboard}"

    @property
    def address(self) -> str:
        """Its GCS."""
        return f"127.0.0.1:{self.port}"

    def kill(self) -> None:
        """End GCS, raylet and dashboard at once; what they ran follows."""
        os.killpg(self.pid, signal.SIGKILL)

    def ask(self, path: str) -> Any:
        """What its HTTP API answers."""
        token = (self.folder / "token").read_text()
        asked = urllib.request.Request(
            f"{self.url}{path}", headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(asked, timeout=10) as reply:
            return json.loads(reply.read())


def environment(token: Path) -> dict[str, str]:
    """Of a head, its jobs and its clients: this Python first, and none of another cluster."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    kept |= {k: v for k, v in os.environ.items() if k in ("RAY_USAGE_STATS_ENABLED",)}
    scripts = sysconfig.get_path("scripts")
    return kept | {
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }


def write_token(path: Path) -> Path:
    """A token file of its own, for its owner alone."""
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    return path


@contextlib.contextmanager
def started_head(cpus: int, extra: Mapping[str, str] | None = None) -> Iterator[Head]:
    """Start a head and end every process of it by its id."""
    folder = Path(tempfile.mkdtemp(prefix="esh-"))  # sockets of longer paths are refused
    token = write_token(folder / "token")
    env = environment(token) | dict(extra or {})
    port, dashboard, client = free_port(), free_port(), free_port()
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *("--port", str(port), "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)),
        *("--ray-client-server-port", str(client), "--dashboard-agent-listen-port", "0"),
        *("--num-cpus", str(cpus), "--num-gpus", "0", "--object-store-memory", "200000000"),
        *("--temp-dir", str(folder / "ray"), "--disable-usage-stats"),
    ]
    with (folder / "head.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            env=env | {"RAY_AUTH_MODE": "token"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    head = Head(process.pid, port, dashboard, folder, env)
    try:
        _wait(process, head)
        yield head
    finally:
        left = _end(process, folder)
        shutil.rmtree(folder, ignore_errors=True)
    assert left == [], "a process of the head outlived the test"


def _wait(process: subprocess.Popen[bytes], head: Head) -> None:
    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            head.ask("/api/jobs/")
        except urllib.error.HTTPError as error:
            error.close()
            time.sleep(0.2)
        except OSError:
            time.sleep(0.2)
        else:
            return
    pytest.fail((head.folder / "head.log").read_text(errors="replace")[-2000:])


def _psutil() -> Any:
    importlib.import_module("ray")  # which brings it
    return importlib.import_module("psutil")


def _members(process: subprocess.Popen[bytes], folder: Path) -> dict[int, Any]:
    """The head's processes: its descendants, and what has left them and still names its folder."""
    psutil = _psutil()
    found: dict[int, Any] = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        head = psutil.Process(process.pid)
        found |= {p.pid: p for p in [head, *head.children(recursive=True)]}
    for other in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            named = any(str(folder) in word for word in other.cmdline())
            inside = other.environ().get("RAY_AUTH_TOKEN_PATH") == str(folder / "token")
            if other.pid != os.getpid() and (named or inside):
                found[other.pid] = other
    return found


def _end(process: subprocess.Popen[bytes], folder: Path) -> list[int]:
    """Kill them all, by id; those that are still there after that."""
    psutil = _psutil()
    deadline = time.monotonic() + 20
    while (members := _members(process, folder)) and time.monotonic() < deadline:
        for member in members.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                if member.status() != psutil.STATUS_ZOMBIE:
                    member.send_signal(signal.SIGKILL)
        process.poll()
        time.sleep(0.1)
        members = {
            pid: p
            for pid, p in members.items()
            if p.is_running() and p.status() != psutil.STATUS_ZOMBIE
        }
        if not members:
            break
    process.wait(20)
    return sorted(members)
