"""What a coordinator knows between two epoch boundaries, so that another can go on after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from esper_ray.actors.deliveries import Deliveries
from esper_ray.actors.journal import News


@dataclass(frozen=True, slots=True)
class Standing:
    """`kept` are attributes of a coordinator; `news` is what its journal has got lately."""

    kept: Mapping[str, Any]
    deliveries: Deliveries
    news: News

    def after(self, older: Standing | None) -> Standing:
        """The same, with a journal that is whole if that of `older`, the one before, is."""
        if older is None or self.news.anew:
            return self
        return Standing(self.kept, self.deliveries, self.news.after(older.news))
