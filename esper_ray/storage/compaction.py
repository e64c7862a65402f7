"""How a layer's log takes up changed rows: as one more delta, a merged one, or a new snapshot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from esper_ray.storage.layer_manifest import LayerSegment

MAX_DELTAS: Final = 16
MAX_DELTA_SHARE: Final = 0.5

Plan = Literal["append", "merge", "rewrite"]


def plan(live: Sequence[LayerSegment], new_bytes: int) -> Plan:
    """What to do with changed rows of `new_bytes` encoded bytes, given the live segments.

    "rewrite" once deltas outweigh MAX_DELTA_SHARE of the full snapshot, "merge" beyond MAX_DELTAS
    deltas, else "append".
    """
    full = sum(segment.ref.size for segment in live if segment.level == "full")
    deltas = [segment for segment in live if segment.level == "delta"]
    if sum(segment.ref.size for segment in deltas) + new_bytes > MAX_DELTA_SHARE * full:
        return "rewrite"
    return "merge" if len({segment.seq for segment in deltas}) >= MAX_DELTAS else "append"
