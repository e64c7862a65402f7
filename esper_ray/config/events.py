"""The part of a run file that says who hears of what the run does."""

from __future__ import annotations

from typing import Annotated

from pydantic import StringConstraints

from esper_ray.config.section import Section


class EventsConfig(Section):
    """Who hears of what the run does; [all of it](events.md) is stored with the run anyway."""

    bus: Annotated[str, StringConstraints(pattern=r"^(none|(memory|ray)://[a-z0-9-]{1,64})$")] = (
        "none"
    )
    """Bus that every commit's events are published on: `none`, `ray://NAME`, an actor of the
    cluster that is made where there is none, or with `--local` `memory://NAME`, in the process."""

    @property
    def url(self) -> str:
        """URL of the bus, "" for none."""
        return "" if self.bus == "none" else self.bus
