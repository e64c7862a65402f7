"""Where a run stands, as one of its commits says it; every value is checked before use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from esper_ray.actors.progress import Progress
from esper_ray.errors import CorruptError
from esper_ray.storage import Root

_TEXTS = ("run", "time", "config_digest")


@dataclass(frozen=True, slots=True)
class RunPoint:
    """What a commit tells besides its segments; `epoch` and `step` are 0 or more."""

    run: str
    time: str
    config_digest: str
    epoch: int
    step: int
    config: Mapping[str, object]
    coordinator: Mapping[str, object]
    progress: Progress

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> RunPoint:
        """Read a commit that nobody vouches for; CorruptError unless every value is possible."""
        for name in _TEXTS:
            if not isinstance(body.get(name), str):
                raise CorruptError(f"a commit has the {name} {body.get(name)!r}, which is no text")
        for name in ("epoch", "step"):
            number = body.get(name)
            if type(number) is not int or not 0 <= number < 2**31:
                raise CorruptError(f"a commit has the {name} {number!r}, which no run reaches")
        for name in ("config", "coordinator"):
            if not isinstance(body.get(name), dict):
                raise CorruptError(f"a commit has no table of its {name}")
        told = {name: body[name] for name in cls.__slots__ if name != "progress"}
        return cls(**told, progress=Progress.from_json(body["coordinator"]))


@dataclass(frozen=True, slots=True)
class Found:
    """A verified commit to start from."""

    root: Root
    seq: int
    body: Mapping[str, Any]
    point: RunPoint

    @classmethod
    def read(cls, root: Root, seq: int, body: Mapping[str, Any]) -> Found:
        """The commit `seq`; CorruptError where what it says of the run is impossible."""
        return cls(root, seq, body, RunPoint.from_json(body))


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run leaves behind; `eval` was measured once, on the test split, at its last epoch.

    `status` is `completed`, `stopped` where somebody asked for its end, or `terminated` by SIGTERM.
    """

    run: str
    status: str
    steps: int
    wall_s: float
    eval: Mapping[str, float]
    seeds: Mapping[str, Mapping[str, int]]
    states_visited: tuple[str, ...]
    transitions: int
    checkpoint: str
