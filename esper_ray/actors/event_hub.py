"""`ray://NAME`: the event bus of a cluster, one named actor; what it has let go is in the log."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from esper_ray.actors.event_feed import EventFeed
from esper_ray.actors.remote import RemoteActor
from esper_ray.errors import BusError, EsperError
from esper_ray.events.broker import DEAD, Group, Record, Retention
from esper_ray.events.bus import EventBus, connect, register
from esper_ray.events.hub import Hub, HubBus, record
from esper_ray.storage import Root, RunLog

NAMESPACE = "esper"
SCHEME = "ray"
_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class EventSettings:
    """Where a run publishes its events: a bus by URL, or "" for none."""

    bus: str = ""
    run: str = ""


class EventHub(Hub):
    """The hub as an actor. It knows where runs are stored, and tells late groups from there."""

    def __init__(
        self, retention: Retention | None = None, stored: Mapping[str, Root] | None = None
    ) -> None:
        super().__init__(retention)
        self._stored = dict(stored or {})  # given here, a restart of the actor knows it too

    async def attach(self, run: str, root: Root) -> None:
        """Read the log of `run` there, where a group asks for more than is kept in memory."""
        self._stored[run] = root

    async def ping(self) -> None:
        """Answer."""

    async def join(self, group: Group, start: str) -> None:
        """See HubPort; a hub that knows a run's log begins there unless it is asked for `new`."""
        run = group.run.removesuffix(DEAD)
        older: Sequence[Record] = ()
        if start != "new" and run == group.run and run in self._stored:
            older = await asyncio.to_thread(_told, run, self._stored[run])
        self.add_group(group, start, older)


def _told(run: str, root: Root) -> list[Record]:
    feed = EventFeed(RunLog(root), run)
    return [record(event) for entry in feed.history() for event in feed.events(entry)]


def start_hub(
    name: str, retention: Retention | None = None, stored: Mapping[str, Root] | None = None
) -> RemoteActor:
    """The hub of that name on the connected cluster; it lives as long as who started it.

    A new one knows where some runs are `stored`. After a crash Ray restarts it, empty.
    """
    import ray

    hub_class: Any = ray.remote(EventHub)
    handle = hub_class.options(
        name=name,
        namespace=NAMESPACE,
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_concurrency=1000,  # consumers wait inside
    ).remote(retention, stored)
    return RemoteActor(handle)


def open_hub(settings: EventSettings, root: Root) -> RemoteActor | None:
    """The hub that a run publishes on, which then knows its log; None where it is of no hub.

    Who calls this keeps a new hub alive, so that it outlives a coordinator.
    """
    scheme, _, name = settings.bus.partition("://")
    if scheme != SCHEME:
        return None
    import ray

    hub = start_hub(name, stored={settings.run: root})
    ray.get(hub.submit("attach", settings.run, root), timeout=_TIMEOUT_S)
    return hub


@dataclass(slots=True)
class RemoteHub:
    """A HubPort on the hub of that name, looked up when it is first needed, and again when lost."""

    name: str
    _actor: RemoteActor | None = field(default=None, init=False)

    def publish(self, records: Sequence[Record]) -> Awaitable[Any]:
        """See HubPort."""
        return self._ask("publish", records)

    def join(self, group: Group, start: str) -> Awaitable[Any]:
        """See HubPort."""
        return self._ask("join", group, start)

    def fetch(self, group: Group, consumer: str, room: int, wait_s: float) -> Awaitable[Any]:
        """See HubPort."""
        return self._ask("fetch", group, consumer, room, wait_s)

    def ack(self, group: Group, consumer: str, done: Record) -> Awaitable[Any]:
        """See HubPort."""
        return self._ask("ack", group, consumer, done._replace(data=b""))

    def nack(self, group: Group, consumer: str, refused: Record, delay_s: float) -> Awaitable[Any]:
        """See HubPort."""
        return self._ask("nack", group, consumer, refused._replace(data=b""), delay_s)

    def leave(self, group: Group, consumer: str) -> Awaitable[Any]:
        """See HubPort."""
        return self._ask("leave", group, consumer)

    def _ask(self, method: str, *args: object) -> Awaitable[Any]:
        """Begin a call, so that calls take place in the order in which they are made."""
        return _Call(self, self._hub().submit(method, *args))

    def _hub(self) -> RemoteActor:
        import ray

        if self._actor is None:
            if not ray.is_initialized():
                raise BusError(f"ray://{self.name} needs Ray, which is not connected here")
            try:
                self._actor = RemoteActor(ray.get_actor(self.name, namespace=NAMESPACE))
            except ValueError as error:
                raise BusError(
                    f"no event hub is named {self.name!r}", "check events.bus and the cluster"
                ) from error
        return self._actor

    async def answer(self, reference: Any) -> Any:
        """The result of a call; BusError where there is none."""
        from ray.exceptions import RayError, RayTaskError

        try:
            return await asyncio.wait_for(_result(reference), _TIMEOUT_S)
        except RayTaskError as error:
            if isinstance(error.cause, EsperError):
                raise error.cause from None
            raise BusError(f"the event hub {self.name!r} failed: {error.cause!r}") from error
        except (RayError, TimeoutError) as error:
            self._actor = None
            raise BusError(
                f"the event hub {self.name!r} does not answer: {type(error).__name__}"
            ) from error


@dataclass(frozen=True, slots=True)
class _Call:
    """A call that was made; what it returns, when it is waited for."""

    hub: RemoteHub
    reference: Any

    def __await__(self) -> Generator[Any, None, Any]:
        return self.hub.answer(self.reference).__await__()


async def _result(reference: Any) -> Any:
    return await reference


def _bus(name: str) -> HubBus:
    return HubBus(RemoteHub(name))


register(SCHEME, _bus)


@contextlib.contextmanager
def connected_bus(url: str, address: str) -> Iterator[EventBus]:
    """The bus at a URL, with the cluster at `address` where it needs one."""
    from esper_ray.actors.placement import Cluster, ClusterSettings

    cluster = Cluster(ClusterSettings(address, _TIMEOUT_S, _TIMEOUT_S))
    if url.startswith(f"{SCHEME}://"):
        cluster.connect(0)
    try:
        yield connect(url)
    finally:
        cluster.close()
