"""Reaches or starts a Ray cluster and places actors on it."""

from __future__ import annotations

import logging
import os
import secrets
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper_ray.actors.layer_actor import CONCURRENCY_GROUPS, METHOD_GROUPS, LayerActor
from esper_ray.actors.lifecycle_coordinator import CoordinatorSpec, LifecycleCoordinator
from esper_ray.actors.processes import cluster_processes, end_processes
from esper_ray.actors.remote import RemoteActor
from esper_ray.errors import ClusterUnavailable, ResourcesTimeout
from esper_ray.growth.spec import StageSpec
from esper_ray.storage import Root

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

NAMESPACE = "esper"
_CONNECT_S = 5.0
_SETTINGS = b"\x04"
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + b"\0" * 5
_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """`address` is `local`, `auto` or HOST:PORT of a Ray head."""

    address: str
    wait_for_resources_s: float
    step_timeout_s: float


@dataclass(slots=True)
class Cluster:
    """A connection to Ray; `close` ends what this run started and nothing else.

    A driver that has called `ray.init` already keeps its own connection.
    """

    settings: ClusterSettings
    _groups: list[PlacementGroup] = field(default_factory=list)
    _actors: list[RemoteActor] = field(default_factory=list)
    _connected_here: bool = False

    def connect(self, stages: int) -> None:
        """Start or join the cluster at `address`; ClusterUnavailable where none answers."""
        address = self.settings.address
        if address == "auto":
            address = os.environ.get("RAY_ADDRESS") or address  # as Ray does, but checked here
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        if address not in ("local", "auto"):
            _check_reachable(address)
        _use_token(private=address == "local")
        import ray

        if ray.is_initialized():
            return
        options: dict[str, Any] = {"address": address, "namespace": NAMESPACE}
        if address == "local":
            cores = max(os.cpu_count() or 1, stages)
            options |= {"num_cpus": cores, "include_dashboard": False}
        try:
            ray.init(
                **options, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False
            )
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise ClusterUnavailable(
                f"no Ray cluster answers at {address!r}: {_first_line(error)}",
                "start one with `ray start --head`, or set cluster.address to local",
            ) from error
        self._connected_here = True

    def place(
        self, specs: tuple[StageSpec, ...], coordinator: CoordinatorSpec, root: Root
    ) -> tuple[list[RemoteActor], RemoteActor]:
        """One LayerActor for each of `specs`, with a CPU and perhaps a GPU, and the coordinator."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        gpus = float(any(spec.device == "cuda" for spec in specs))
        each = {"CPU": 1.0, "GPU": gpus} if gpus else {"CPU": 1.0}
        group = placement_group([each] * len(specs), strategy="PACK")
        self._groups.append(group)
        if not group.wait(self.settings.wait_for_resources_s):
            scarce = "GPU" if gpus else "CPU"
            waited_s = self.settings.wait_for_resources_s
            raise ResourcesTimeout(_shortage(len(specs), scarce, waited_s))
        decorate: Any = ray.remote(concurrency_groups=CONCURRENCY_GROUPS)  # type: ignore[call-overload]
        layer_class = decorate(LayerActor)
        layers = [
            layer_class.options(
                num_cpus=1,
                num_gpus=gpus,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=bundle
                ),
            ).remote(spec, root, self.settings.step_timeout_s)
            for bundle, spec in zip(_by_node(group), specs, strict=True)
        ]
        coordinator_class: Any = ray.remote(LifecycleCoordinator)
        central = coordinator_class.options(num_cpus=0).remote(coordinator, root)
        actors = [RemoteActor(handle, METHOD_GROUPS) for handle in layers]
        self._actors += [*actors, RemoteActor(central)]
        return actors, self._actors[-1]

    def close(self) -> None:
        """End the actors and give back their places; end the cluster if it was started here."""
        if not (self._connected_here or self._groups):
            return  # also saves importing Ray
        import ray
        from ray.util.placement_group import remove_placement_group

        if not ray.is_initialized():
            return
        for actor in self._actors:
            ray.kill(actor.handle)
        for group in self._groups:
            remove_placement_group(group)
        self._actors.clear()
        self._groups.clear()
        if self._connected_here:
            private = cluster_processes() if self.settings.address == "local" else []
            ray.shutdown()
            end_processes(private)
            self._connected_here = False


def _check_reachable(address: str) -> None:
    """Fail in seconds where Ray itself would retry for a minute."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()):
        raise ClusterUnavailable(
            f"cluster.address {address!r} is not HOST:PORT", "use local, auto or HOST:PORT"
        )
    try:
        with socket.create_connection((host, int(port)), _CONNECT_S) as connection:
            _greet(connection)
    except (OSError, OverflowError, ValueError) as error:  # ValueError: no name that DNS knows
        raise ClusterUnavailable(
            f"no Ray cluster answers at {address!r}: {error}",
            "check the address, or set cluster.address to local",
        ) from error


def _greet(connection: socket.socket) -> None:
    """Raise OSError unless the other side speaks HTTP/2, as a Ray head does, in time."""
    if os.environ.get("RAY_USE_TLS") in (None, "", "0"):
        connection.sendall(_HTTP2_HELLO)
        answer = connection.recv(9)
        if answer[3:4] != _SETTINGS:
            raise ConnectionError("something else than Ray listens there")


def _use_token(*, private: bool) -> None:
    """Authenticate where a token exists; a private cluster gets one that only its children see.

    Ray reads these variables when it is first imported.
    """
    known = (
        os.environ.get("RAY_AUTH_TOKEN")
        or os.environ.get("RAY_AUTH_TOKEN_PATH")
        or (Path.home() / ".ray" / "auth_token").exists()
    )
    if private and not known:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    if private or known:
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _by_node(group: PlacementGroup) -> list[int]:
    """Bundles so that neighbours lie on one node: their own order says nothing of it."""
    from ray.util.placement_group import placement_group_table

    nodes = placement_group_table(group)["bundles_to_node_id"]
    return sorted(nodes, key=lambda bundle: (nodes[bundle], bundle))


def _shortage(needed: int, what: str, waited_s: float) -> str:
    import ray

    total, free = (
        int(resources().get(what, 0))  # type: ignore[no-untyped-call]
        for resources in (ray.cluster_resources, ray.available_resources)
    )
    return f"need {needed} {what}, cluster has {total} ({free} free) after {waited_s:.0f} s"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
