"""Which run commits are kept: a pure decision over numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Retention:
    """Keep the newest `last` commits of a history, and each whose number `every` divides."""

    last: int = 20
    every: int = 0

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ValueError(f"last must be at least 1, got {self.last}")
        if self.every < 0:
            raise ValueError(f"every must be at least 0, got {self.every}")


def kept(
    history: Sequence[int], stored: Iterable[int], pinned: Iterable[int], policy: Retention
) -> set[int]:
    """Numbers of the stored commits to keep; `history` is the current one, newest first."""
    there = set(stored)
    regular = {seq for seq in history if policy.every and seq % policy.every == 0}
    # The highest number stays in any case, so that no number is ever given twice.
    chosen = {*history[: policy.last], *regular, *pinned, max(there, default=0)}
    return chosen & there
