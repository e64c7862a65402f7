"""Judges transition requests: the table, minimum epochs and gates, in that order, then budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from esper_ray.errors import ConfigError
from esper_ray.lifecycle.budgets import Budgets, admit
from esper_ray.lifecycle.gates import GATES, GateSettings, gate_of
from esper_ray.lifecycle.refusal import Refusal, below
from esper_ray.lifecycle.requests import Decisions, Requests
from esper_ray.lifecycle.states import MINIMUM_EPOCHS, Cause, ExtendedLifecycle
from esper_ray.lifecycle.transitions import LAST_GENERATION, MOVES, RENEWABLE

_S = ExtendedLifecycle
_STATES = len(_S)
_CULLED, _ERROR = int(_S.CULLED), int(Cause.ERROR)
_GATED = np.array([source * _STATES + target for source, target in GATES])
_WAIVED = np.isin(np.arange(_STATES), [_S.ROLLED_BACK, _S.CANCELLED])


@dataclass(frozen=True, slots=True)
class LifecycleManager:
    """Accepts or refuses requests; holds settings, never a seed's state.

    `replanting` lets terminal seeds other than FOSSILIZED start a new generation.
    """

    gates: GateSettings = field(default_factory=GateSettings)
    minimum_epochs: Mapping[ExtendedLifecycle, int] = field(
        default_factory=lambda: dict(MINIMUM_EPOCHS)
    )
    budgets: Budgets = field(default_factory=Budgets)
    replanting: bool = False
    _minimum: NDArray[np.int32] = field(init=False, repr=False, compare=False)
    _least: NDArray[np.int32] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for state, least in self.minimum_epochs.items():
            whole = 0 <= least < 2**31 and least == int(least)
            if state not in MINIMUM_EPOCHS or not whole:
                raise ConfigError(
                    f"the minimum of state {state!r} cannot be {least} epochs",
                    "give live states 0 or more epochs in lifecycle.minimum_epochs",
                )
        minimum = np.zeros(_STATES, dtype=np.int32)
        minimum[list(self.minimum_epochs)] = list(self.minimum_epochs.values())
        object.__setattr__(self, "_minimum", minimum)
        by_move = np.where(_WAIVED, 0, minimum[:, None]).astype(np.int32)  # [from, to]
        object.__setattr__(self, "_least", by_move.reshape(-1))

    def judge(self, requests: Requests) -> Decisions:
        """Decide every row on its own; work grows with the rows, and nothing is changed."""
        source, target = requests.source, requests.target
        known = below(source, _STATES) & below(target, _STATES)
        all_known = np.count_nonzero(known) == len(known)
        edge = (
            source * _STATES + target
            if all_known
            else np.where(known, source * _STATES + target, 0)
        )
        reason = MOVES.reshape(-1)[edge]
        early = requests.epochs_in_state < self._least[edge]
        early &= (target != _CULLED) | (requests.cause != _ERROR)
        if np.count_nonzero(early):
            reason[early & (reason == 0)] = Refusal.TOO_EARLY
        if not all_known:
            reason[~known] = Refusal.UNKNOWN_STATE
        self._pass_gates(requests, edge, reason)
        anew = requests.replants.nonzero()[0]
        if len(anew):
            anew = anew[known[anew]]
            reason[anew] = self._judge_replanting(requests.take(anew))
        return Decisions(requests, reason, self.gates, self._minimum)

    def admit(
        self, decisions: Sequence[Decisions], occupied: Mapping[str, NDArray[np.int64]]
    ) -> list[Decisions]:
        """Refuse what is over budget; `occupied` (11,) counts each layer's seeds by state."""
        return admit(decisions, occupied, self.budgets)

    def _judge_replanting(self, requests: Requests) -> NDArray[np.uint8]:
        reason = np.zeros(len(requests), dtype=np.uint8)
        if not self.replanting:
            reason[:] = Refusal.REPLANTING_OFF
            return reason
        since = requests.metrics.get("epochs_since_end", np.full(len(requests), -1.0))
        early = ~(since >= self.budgets.embargo_epochs) & (self.budgets.embargo_epochs > 0)
        reason[(requests.source == _S.CULLED) & early] = Refusal.EMBARGO
        reason[requests.generation == LAST_GENERATION] = Refusal.GENERATIONS_USED_UP
        reason[~RENEWABLE[requests.source]] = Refusal.NOT_IN_TABLE
        return reason

    def _pass_gates(
        self, requests: Requests, edge: NDArray[np.int32], reason: NDArray[np.uint8]
    ) -> None:
        for code in _GATED[np.bincount(edge, minlength=_STATES**2)[_GATED] > 0].tolist():
            gate = gate_of(code // _STATES, code % _STATES, requests.objective)
            rows = ((edge == code) & (reason == 0)).nonzero()[0]
            if gate is not None and len(rows):
                opens = gate.opens(requests.values(rows, gate.reads), self.gates)
                reason[rows[np.logical_not(opens)] if np.ndim(opens) else rows] = Refusal.GATE
