"""Ends the processes of a private Ray cluster for certain; a few outlive `ray.shutdown`."""

from __future__ import annotations

import contextlib
from typing import Any

GRACE_S = 5.0


def cluster_processes() -> list[Any]:
    """This process's children that serve the connected cluster, and all that those started."""
    import psutil  # Ray brings it, and makes it importable
    import ray

    session = ray.get_runtime_context().get_session_name()
    found: list[Any] = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(session in word for word in child.cmdline()):
                found += [child, *child.children(recursive=True)]
    return found


def end_processes(processes: list[Any]) -> list[int]:
    """Wait for their end, kill what stays; returns the ids of any that still live."""
    import psutil

    _, alive = psutil.wait_procs(processes, timeout=GRACE_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return [process.pid for process in psutil.wait_procs(alive, timeout=GRACE_S)[1]]
