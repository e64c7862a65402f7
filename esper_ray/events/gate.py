"""A judged gate as one line of canonical JSON, as events carry it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Final, TypedDict

from esper_ray.errors import CorruptError

MAX_TEXT_BYTES: Final = 65_536
"""The longest text that an event holds, in UTF-8."""


class Gate(TypedDict):
    """A judged gate: what was measured (None = was not), what was asked, the verdict."""

    name: str
    inputs: dict[str, float | None]
    thresholds: dict[str, str]
    verdict: str


def gate_json(
    name: str,
    inputs: Mapping[str, float | None],
    thresholds: Mapping[str, str],
    verdict: str,
) -> str:
    """Canonical JSON of a judged gate; inputs that are not finite become null.

    A threshold reads ">= 0.002"; the verdict is "accepted" or the reason of the refusal.
    """
    measured = {
        key: float(value) if value is not None and math.isfinite(value) else None
        for key, value in inputs.items()
    }
    gate = Gate(name=name, inputs=measured, thresholds=dict(thresholds), verdict=verdict)
    return json.dumps(
        gate, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def parse_gate(text: str) -> Gate | None:
    """The gate of a stored text, None for ""; CorruptError unless `gate_json` could write it."""
    if not text:
        return None
    try:
        if len(text.encode()) > MAX_TEXT_BYTES:
            raise ValueError("it is too long")
        gate: Gate = json.loads(text)
        # What comes back as the same text has no key twice, no NaN and no other field.
        if gate_json(**gate) != text:
            raise ValueError("it is not canonical")
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CorruptError(f"a gate in the event log is malformed: {error}") from error
    texts = [gate["name"], gate["verdict"], *gate["thresholds"].values()]
    if not all(isinstance(value, str) for value in texts):
        raise CorruptError("a gate in the event log has a number where a text belongs")
    return gate
