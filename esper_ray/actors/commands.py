"""What people ask of seeds while a run goes on, until it is answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from esper_ray.events.messages import Answer, TelemetryBatch
from esper_ray.lifecycle import Refusal, move_of
from esper_ray.policy import Command


@dataclass(frozen=True, slots=True)
class _Asked:
    number: int
    action: str
    layer_id: str
    seed_id: int


class Commands:
    """Requests wait for the next epoch boundary; each seed of each gets one answer."""

    def __init__(self) -> None:
        self._number = 0
        self._waiting: list[_Asked] = []
        self._open: dict[tuple[str, int], _Asked] = {}
        self._answers: list[Answer] = []

    def add(self, action: str, layer_id: str, seed_ids: Sequence[int]) -> int:
        """Queue a request; its number. ConfigError for an unknown action."""
        move_of(action)
        self._number += 1
        self._waiting += [_Asked(self._number, action, layer_id, int(seed)) for seed in seed_ids]
        return self._number

    @property
    def waiting(self) -> list[tuple[str, str, int]]:
        """(action, layer id, seed id) of what was asked since the last boundary."""
        return [(asked.action, asked.layer_id, asked.seed_id) for asked in self._waiting]

    def take(self, telemetry: Mapping[str, TelemetryBatch]) -> dict[str, dict[int, Command]]:
        """What is asked of each layer now, by seed; the first request for a seed stands.

        Requests that name no seed are answered at once.
        """
        commands: dict[str, dict[int, Command]] = {layer: {} for layer in telemetry}
        waiting, self._waiting = self._waiting, []
        for asked in waiting:
            seeds = telemetry.get(asked.layer_id)
            if seeds is None or not 0 <= asked.seed_id < len(seeds.state):
                self._answer(asked, Refusal.UNKNOWN_SEED)
            elif asked.seed_id in commands[asked.layer_id]:
                self._answer(asked, Refusal.DUPLICATE_SEED)
            else:
                command = Command(asked.number, *move_of(asked.action))
                commands[asked.layer_id][asked.seed_id] = command
                self._open[asked.layer_id, asked.seed_id] = asked
        return commands

    def ask_again(self) -> None:
        """Let what was taken and not answered wait once more: its boundary is done again."""
        self._waiting, self._open = [*self._open.values(), *self._waiting], {}

    def settle(self, layer_id: str, seed_ids: NDArray[np.int64], reason: NDArray[np.uint8]) -> None:
        """Note what became of some rows: Refusal codes, 0 = accepted so far, or applied."""
        if not self._open:
            return
        for seed_id, code in zip(seed_ids.tolist(), reason.tolist(), strict=True):
            asked = self._open.get((layer_id, seed_id))
            if asked is not None and code != Refusal.NONE:
                del self._open[layer_id, seed_id]
                self._answer(asked, Refusal(code))

    def answered(self) -> tuple[Answer, ...]:
        """The answers of this boundary; what is still open was done."""
        for asked in self._open.values():
            self._answer(asked, Refusal.NONE)
        answers, self._answers, self._open = self._answers, [], {}
        return tuple(sorted(answers, key=lambda a: (a.number, a.layer_id, a.seed_id)))

    def _answer(self, asked: _Asked, refusal: Refusal) -> None:
        self._answers.append(
            Answer(asked.number, asked.action, asked.layer_id, asked.seed_id, refusal)
        )
