"""Reaches or starts a Ray cluster and places actors on it."""

from __future__ import annotations

import logging
import os
import socket
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from esper_ray.actors.coordinator_spec import CoordinatorSpec
from esper_ray.actors.layer_actor import CONCURRENCY_GROUPS, METHOD_GROUPS, LayerActor
from esper_ray.actors.lifecycle_coordinator import LifecycleCoordinator
from esper_ray.actors.processes import cluster_processes, end_processes
from esper_ray.actors.remote import RemoteActor
from esper_ray.actors.tokens import use_token
from esper_ray.errors import ClusterUnavailable, ResourcesTimeout, RunFailed, first_line
from esper_ray.growth.spec import StageSpec
from esper_ray.storage import Root

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

NAMESPACE = "esper"
_CONNECT_S = 5.0
_NAME_FREE_S = 20.0
_PING_S = 5.0
_SETTINGS = b"\x04"
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + b"\0" * 5
_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # of steps after the one whose failure is raised
    "RAY_USAGE_STATS_ENABLED": "0",
}


def coordinator_name(run: str) -> str:
    """Under which name, in NAMESPACE, the coordinator of a run is found on its cluster."""
    return f"esper/{run}/coordinator"


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """`address` is `local`, `auto` or HOST:PORT of a Ray head."""

    address: str
    wait_for_resources_s: float
    step_timeout_s: float
    answer_timeout_s: float = 10.0


@dataclass(slots=True)
class Cluster:
    """A connection to Ray; `close` ends what this run started and nothing else.

    A driver that has called `ray.init` already keeps its own connection.
    """

    settings: ClusterSettings
    _group: PlacementGroup | None = None
    _bundles: list[int] = field(default_factory=list)
    _layers: dict[int, RemoteActor] = field(default_factory=dict)
    _central: RemoteActor | None = None
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
        use_token(private=address == "local")
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
                f"no Ray cluster answers at {address!r}: {first_line(error)}",
                "check that it runs and that RAY_AUTH_TOKEN_PATH names its token, "
                "or set cluster.address to local",
            ) from error
        self._connected_here = True

    def place(
        self, specs: tuple[StageSpec, ...], coordinator: CoordinatorSpec, root: Root
    ) -> tuple[list[RemoteActor], RemoteActor]:
        """One LayerActor for each of `specs`, with a CPU and perhaps a GPU, and the coordinator;
        those that live are kept."""
        group, bundles = self._reserve(len(specs), _gpus(specs[0]))
        for rank, spec in enumerate(specs):
            if rank not in self._layers:
                self._layers[rank] = self._start_layer(spec, root, group, bundles[rank])
        if self._central is None:
            self._central = _start_coordinator(coordinator, root)
        return [self._layers[rank] for rank in range(len(specs))], self._central

    def drop(self, actor: RemoteActor) -> None:
        """Kill an actor; the next `place` starts another instead."""
        import ray

        ray.kill(actor.handle)
        self._layers = {rank: each for rank, each in self._layers.items() if each is not actor}
        if self._central is actor:
            self._central = None

    def _reserve(self, bundles: int, gpus: int) -> tuple[PlacementGroup, list[int]]:
        """The run's placement group, and which bundle each actor has; waits for its resources.

        Ray gives the bundles of a lost node another place as soon as there is one.
        """
        from ray.util.placement_group import placement_group

        if self._group is None:
            each = {"CPU": 1.0, "GPU": 1.0} if gpus else {"CPU": 1.0}
            self._group = placement_group([each] * bundles, strategy="PACK")
        waited_s = self.settings.wait_for_resources_s
        if not self._group.wait(waited_s):
            raise ResourcesTimeout(_shortage(bundles, "GPU" if gpus else "CPU", waited_s))
        if not self._bundles:
            self._bundles = _by_node(self._group)
        return self._group, self._bundles

    def _start_layer(
        self, spec: StageSpec, root: Root, group: PlacementGroup, bundle: int
    ) -> RemoteActor:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        decorate: Any = ray.remote(concurrency_groups=CONCURRENCY_GROUPS)  # type: ignore[call-overload]
        where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        layer_class = decorate(LayerActor).options(
            num_cpus=1,
            num_gpus=_gpus(spec),
            max_restarts=0,
            scheduling_strategy=where,
        )
        handle = layer_class.remote(spec, root, self.settings.step_timeout_s)
        return RemoteActor(handle, METHOD_GROUPS)

    def close(self) -> None:
        """End the actors and give back their places; end the cluster if it was started here."""
        if not self._connected_here and self._group is None:
            return  # also saves importing Ray
        import ray
        from ray.util.placement_group import remove_placement_group

        if not ray.is_initialized():
            return
        for actor in [*self._layers.values(), *([self._central] if self._central else [])]:
            self.drop(actor)
        if self._group is not None:
            remove_placement_group(self._group)
        self._group, self._bundles = None, []
        if self._connected_here:
            private = cluster_processes() if self.settings.address == "local" else []
            ray.shutdown()
            end_processes(private)
            self._connected_here = False


def _start_coordinator(spec: CoordinatorSpec, root: Root) -> RemoteActor:
    """The named actor; RunFailed where a run of this name is at work on the cluster.

    A name is free as soon as Ray has noticed that its actor or the driver of that is gone.
    """
    import ray
    from ray.exceptions import ActorAlreadyExistsError

    run = str(spec.manifest["run"])
    name, deadline = coordinator_name(run), time.monotonic() + _NAME_FREE_S
    coordinator_class: Any = ray.remote(LifecycleCoordinator)
    while True:
        try:
            handle = coordinator_class.options(
                num_cpus=0, name=name, namespace=NAMESPACE, max_restarts=0
            ).remote(spec, root)
            return RemoteActor(handle)
        except ActorAlreadyExistsError as error:
            if time.monotonic() > deadline:
                if _answers(name):
                    raise RunFailed(
                        f"a run named {run!r} is at work on this cluster",
                        "wait for its end, stop it, or give this run another name",
                    ) from error
                deadline = time.monotonic() + _NAME_FREE_S
            time.sleep(0.1)


def _answers(name: str) -> bool:
    """Whether the actor of that name is there; one that does not answer is killed."""
    import ray
    from ray.exceptions import RayError

    try:
        handle: Any = ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return False
    try:
        ray.get(handle.ping.remote(), timeout=_PING_S)
    except RayError:
        ray.kill(handle)
        return False
    return True


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


def _gpus(spec: StageSpec) -> int:
    return int(spec.device == "cuda")


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
