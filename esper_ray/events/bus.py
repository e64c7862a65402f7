"""The event bus: what publishers and consumers hold on to, whichever adapter carries it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Literal, Protocol, Self

from esper_ray.errors import ConfigError
from esper_ray.events.event import Event

Start = Literal["new", "earliest"] | str


class Delivery(Protocol):
    """An event on its way to one consumer; unless acknowledged, it is delivered again."""

    @property
    def event(self) -> Event:
        """The event itself."""
        ...

    async def ack(self) -> None:
        """Done: this group does not get it again."""
        ...

    async def nack(self, delay_s: float = 0.0) -> None:
        """Not done: deliver it, and what follows it in its layer and shard, after a delay."""
        ...


class Deliveries(Protocol):
    """What a consumer iterates over, without end."""

    def __aiter__(self) -> Self:
        """Itself."""
        ...

    async def __anext__(self) -> Delivery:
        """The next event, as soon as there is one."""
        ...

    async def aclose(self) -> None:
        """Leave: what was not acknowledged goes to the others of the group."""
        ...


class EventBus(Protocol):
    """Carries events at least once, in order per (run, layer, shard)."""

    async def publish(self, events: Sequence[Event]) -> None:
        """Return once the bus has accepted them, or raise BusError; a repeat has one effect.

        EventRefused, and none is accepted, where an event is too large or no reader would take it.
        """
        ...

    def subscribe(
        self, *, group: str, run: str, layer: str | None = None, start: Start = "new"
    ) -> Deliveries:
        """The events of a run, or of one layer; consumers of one group share them.

        A group that is new begins with what is `new`, with the `earliest` that is kept, or after
        the event with an id; BusError if that is not kept. One that exists goes on. Events that
        were refused too often are those of the run `RUN.dead`.
        """
        ...

    async def close(self) -> None:
        """Leave every group that was joined through this object."""
        ...


Factory = Callable[[str], EventBus]
_SCHEMES: Final[dict[str, Factory]] = {}


def register(scheme: str, factory: Factory) -> None:
    """Have `connect` make buses of a scheme by calling `factory` with what follows `scheme://`."""
    _SCHEMES[scheme] = factory


def connect(url: str) -> EventBus:
    """The bus at a URL such as memory://NAME; ConfigError for a scheme that is not known.

    `ray://NAME` is known once esper_ray.actors.event_hub is imported.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in sorted(_SCHEMES))
        raise ConfigError(f"no event bus is known for {url[:200]!r}", f"known are {known}")
    return _SCHEMES[scheme](rest)
