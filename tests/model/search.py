"""Breadth-first search of a whole state space, with the shortest trace to what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

S = TypeVar("S", bound=Hashable)


class Step(NamedTuple, Generic[S]):
    """One action; `fair` ones happen sooner or later as long as they stay possible."""

    label: str
    state: S
    fair: bool


@dataclass(frozen=True, slots=True)
class Found:
    """What a search saw; `wrong` is empty if every state holds, else `trace` leads there."""

    states: int
    steps: int
    depth: int
    wrong: str = ""
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        size = f"{self.states} states, {self.steps} steps, depth {self.depth}"
        lines = [f"{i:3} {label}" for i, label in enumerate(self.trace, 1)]
        return "\n".join([size, *lines, self.wrong])


class Truncated(AssertionError):
    """The space is larger than the limit, so the search proves nothing."""


def search(
    start: S,
    steps: Callable[[S], Iterable[Step[S]]],
    breach: Callable[[S], str],
    at_rest: Callable[[S], bool],
    limit: int,
) -> Found:
    """Visit every reachable state; stop at the first for which `breach` has words.

    Where none has, a state from which fair steps alone cannot reach rest is wrong too. Raises
    Truncated above `limit` states.
    """
    states, number = [start], {start: 0}
    parents: list[tuple[int, str]] = [(-1, "")]
    depths = [0]
    fair_into: list[list[int]] = [[]]
    taken = 0
    for i, state in enumerate(states):  # grows while it is walked: that is the queue
        if wrong := breach(state):
            return Found(len(states), taken, depths[i], wrong, _trace(parents, i))
        for label, after, fair in steps(state):
            taken += 1
            j = number.setdefault(after, len(states))
            if j == len(states):
                if j == limit:
                    raise Truncated(f"more than {limit} states: raise the limit or the bounds")
                states.append(after)
                parents.append((i, label))
                depths.append(depths[i] + 1)
                fair_into.append([])
            if fair:
                fair_into[j].append(i)
    stuck = _stuck([i for i, state in enumerate(states) if at_rest(state)], fair_into)
    if stuck is None:
        return Found(len(states), taken, depths[-1])
    wrong = "fair steps alone never lead to rest from here"
    return Found(len(states), taken, depths[-1], wrong, _trace(parents, stuck))


def _trace(parents: list[tuple[int, str]], i: int) -> tuple[str, ...]:
    labels = []
    while i > 0:
        i, label = parents[i]
        labels.append(label)
    return tuple(reversed(labels))


def _stuck(resting: list[int], fair_into: list[list[int]]) -> int | None:
    good = bytearray(len(fair_into))
    for i in resting:
        good[i] = 1
    queue = resting
    for j in queue:  # grows while it is walked
        for i in fair_into[j]:
            if not good[i]:
                good[i] = 1
                queue.append(i)
    first = good.find(0)
    return None if first < 0 else first
