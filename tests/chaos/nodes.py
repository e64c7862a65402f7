"""A Ray cluster of several nodes on this machine, whose processes can be killed one by one."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

LAYER, COORDINATOR = "ray::LayerActor", "ray::LifecycleCoordinator"
_FAST_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
    "health_check_timeout_ms": 1000,
}


class Nodes:
    """A head without CPUs, which drivers join, and nodes of one CPU each."""

    def __init__(self, nodes: int) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": _FAST_CHECKS}
        self._cluster: Any = Cluster(initialize_head=True, head_node_args=head)
        self._seen: dict[int, Any] = {}
        for _ in range(nodes):
            self.add()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._cluster.gcs_address.rpartition(':')[2]}"

    def add(self) -> None:
        self._cluster.add_node(num_cpus=1, include_log_monitor=False)

    def workers(self, title: str) -> list[Any]:
        """Processes of actors of a class, wherever they run."""
        import psutil  # type: ignore[import-untyped,unused-ignore]  # bundled in Ray

        found = []
        for node in [self._cluster.head_node, *self._cluster.worker_nodes]:
            for process in self._processes(node):
                with contextlib.suppress(psutil.Error):
                    if process.cmdline()[:1] and process.cmdline()[0].startswith(title):
                        found.append(process)
        return found

    def node_of(self, title: str) -> Any:
        """A node, other than the head, that runs such an actor."""
        pids = {process.pid for process in self.workers(title)}
        nodes = self._cluster.worker_nodes
        return next(n for n in nodes if pids & {p.pid for p in self._processes(n)})

    def kill_node(self, node: Any) -> None:
        """SIGKILL for the node's daemons; its workers end as they lose them."""
        self._processes(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def stop_node(self, node: Any) -> list[Any]:
        """SIGSTOP for a node and its workers: it is away, and may come back."""
        stopped = self._processes(node)
        for process in stopped:
            process.send_signal(signal.SIGSTOP)
        return stopped

    def close(self) -> None:
        for node in [self._cluster.head_node, *self._cluster.worker_nodes]:
            self._processes(node)
        self._cluster.shutdown()
        deadline = time.monotonic() + 10
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in left:
            process.kill()

    def _processes(self, node: Any) -> list[Any]:
        """The raylet of a node and all that it has started."""
        import psutil

        [raylet] = node.all_processes["raylet"]
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(raylet.process.pid)
            found = [parent, *parent.children(recursive=True)]
            self._seen.update({process.pid: process for process in found})
            return found
        return []

    def _left(self) -> list[Any]:
        return [p for p in self._seen.values() if p.is_running() and p.status() != "zombie"]


@contextlib.contextmanager
def nodes_of(count: int) -> Iterator[Nodes]:
    """A cluster that ends with the block, all of its processes certainly."""
    nodes = Nodes(count)
    try:
        yield nodes
    finally:
        nodes.close()


def kill(process: Any) -> None:
    """SIGKILL for one process that this test has started."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
