"""From any older version of what is stored to the present one, a version at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from esper_ray.errors import MigrationError, TooNewError

T = TypeVar("T")


def migrate(value: T, version: object, newest: int, steps: Mapping[int, Callable[[T], T]]) -> T:
    """`value` of a version brought to `newest`; steps[n] is a pure function from n to n + 1.

    TooNewError for a version that is not known yet, MigrationError for one that never was.
    """
    if type(version) is not int or version < 1:
        raise MigrationError(f"it has the version {version!r}, which never was")
    if version > newest:
        raise TooNewError(
            f"it has version {version}, this program knows up to {newest}", "update esper-ray"
        )
    for number in range(version, newest):
        value = steps[number](value)
    return value
