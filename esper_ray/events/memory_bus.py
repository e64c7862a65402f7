"""`memory://NAME`: a bus inside this process, kept while someone holds on to it."""

from __future__ import annotations

import weakref
from typing import Final

from esper_ray.events.bus import register
from esper_ray.events.hub import Hub, HubBus

_HUBS: Final[weakref.WeakValueDictionary[str, Hub]] = weakref.WeakValueDictionary()


def memory_bus(name: str) -> HubBus:
    """A bus on the hub of that name, which ends with the last bus on it."""
    hub = _HUBS.get(name)
    if hub is None:
        hub = _HUBS[name] = Hub()
    return HubBus(hub)


register("memory", memory_bus)
