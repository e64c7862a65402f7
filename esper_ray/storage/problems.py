"""What a check of stored objects finds."""

from __future__ import annotations

from typing import Literal, TypedDict


class Problem(TypedDict):
    """One finding: "damage" is bytes lost or changed, "note" is harmless."""

    object: str
    problem: str
    severity: Literal["damage", "note"]


def damage(path: str, problem: object) -> Problem:
    """Bytes of an object are lost or changed."""
    return {"object": path, "problem": str(problem), "severity": "damage"}


def note(path: str, problem: str) -> Problem:
    """Something that does no harm."""
    return {"object": path, "problem": problem, "severity": "note"}


def in_order(problems: list[Problem]) -> list[Problem]:
    """The findings by object."""
    return sorted(problems, key=lambda problem: (problem["object"], problem["problem"]))
