"""Finds values of a run file that only their owner should know: they are not uploaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

_SECRET = re.compile(
    r"(^|_)(key|secret|token|password|passwd|credentials?|connection_string|sas|sas_token)$", re.I
)
_USER_IN_URL = re.compile(r"://[^/@\s]+@")
_PUBLIC: Final = frozenset({"", "anon", "cloud", "google_default"})
"""Values that say how a secret is found, and are none."""


def secret_names(value: object, name: str = "") -> Iterator[str]:
    """Dotted names of what looks like a key, token or password in plain nested values."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from secret_names(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, item in enumerate(value):
            yield from secret_names(item, f"{name}.{index}")
    elif isinstance(value, str) and _is_secret(name, value):
        yield name


def _is_secret(name: str, value: str) -> bool:
    parts = [part for part in name.split(".") if not part.isdecimal()]
    named = any(_SECRET.search(part) for part in parts)
    return (named and value not in _PUBLIC) or _USER_IN_URL.search(value) is not None
