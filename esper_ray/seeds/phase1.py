"""Phase 1's state tensor, (seeds, 4), as a view of the columns, and the way from its states."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType

import torch
from torch import Tensor

from esper_ray.errors import ConfigError
from esper_ray.grafting import STRATEGIES
from esper_ray.lifecycle import BLENDED_STATES, ExtendedLifecycle
from esper_ray.seeds.columns import SeedColumns
from esper_ray.seeds.state_tensor import ExtendedStateTensor

_S = ExtendedLifecycle


class Phase1State(IntEnum):
    """The five states of the original implementation."""

    DORMANT = 0
    LOADING = 1
    ACTIVE = 2
    ERROR_RECOVERY = 3
    FOSSILIZED = 4


TO_PHASE2: Mapping[Phase1State, ExtendedLifecycle] = MappingProxyType(
    {
        Phase1State.DORMANT: _S.DORMANT,
        Phase1State.LOADING: _S.GRAFTING,
        Phase1State.ACTIVE: _S.STABILIZATION,
        Phase1State.ERROR_RECOVERY: _S.ROLLED_BACK,
        Phase1State.FOSSILIZED: _S.FOSSILIZED,
    }
)
TO_PHASE1: Mapping[ExtendedLifecycle, Phase1State] = MappingProxyType(
    {
        _S.DORMANT: Phase1State.DORMANT,
        _S.GERMINATED: Phase1State.LOADING,
        _S.TRAINING: Phase1State.LOADING,
        _S.GRAFTING: Phase1State.LOADING,
        _S.STABILIZATION: Phase1State.ACTIVE,
        _S.EVALUATING: Phase1State.ACTIVE,
        _S.FINE_TUNING: Phase1State.ACTIVE,
        _S.FOSSILIZED: Phase1State.FOSSILIZED,
        _S.CULLED: Phase1State.ERROR_RECOVERY,
        _S.CANCELLED: Phase1State.DORMANT,
        _S.ROLLED_BACK: Phase1State.ERROR_RECOVERY,
    }
)


class StateTensor:
    """Columns 0 to 3 of a layer's seeds: lifecycle state, blueprint, epochs, grafting strategy.

    A view: it shares the memory of the columns, and states are those of Phase 2.
    """

    def __init__(self, columns: SeedColumns) -> None:
        self._columns = columns

    @property
    def data(self) -> Tensor:
        """(seeds, 4) int32."""
        return self._columns.state_tensor[:, :4]

    def export(self) -> dict[str, Tensor]:
        """Phase 1's columns in its widths and state codes; (seeds,) int8, int32, int16, int8."""
        codes = torch.tensor([TO_PHASE1[state] for state in _S], dtype=torch.int8)
        state, blueprint, epochs, strategy = self.data.cpu().unbind(1)
        return {
            "lifecycle_state": codes[state.long()],
            "blueprint_id": blueprint.clone(),
            "epochs_in_state": epochs.clamp(max=2**15 - 1).to(torch.int16),
            "grafting_strategy": strategy.to(torch.int8),
        }


def migrate(
    table: Tensor,
    alpha: Tensor | None = None,
    states: Mapping[Phase1State, ExtendedLifecycle] = TO_PHASE2,
) -> ExtendedStateTensor:
    """Phase 2 state from a Phase 1 table, (seeds, 4) integers; `alpha` (seeds,) is LOADING's.

    ConfigError names a table of another shape and the first row that Phase 1 could not have.
    """
    if table.ndim != 2 or table.shape[1] != 4 or table.is_floating_point() or len(table) == 0:
        raise ConfigError(
            f"a Phase 1 table has shape (seeds, 4) of integers, this one is {tuple(table.shape)} "
            f"of {table.dtype}"
        )
    rows = table.cpu().to(torch.int64)
    ramp = torch.zeros(len(rows)) if alpha is None else alpha.cpu().float()
    _check(rows, ramp)
    codes = torch.tensor([states[state] for state in Phase1State])
    state = ExtendedStateTensor(len(rows))
    state.columns[:4] = rows.T.to(torch.int32)
    new = codes[rows[:, 0]].to(torch.int32)
    state.columns[state.LIFECYCLE_STATE] = new
    dormant = (new == _S.DORMANT) & (rows[:, 1] == 0)  # Phase 1 has no number for "none"
    state.columns[state.BLUEPRINT_ID, dormant] = -1
    full = torch.isin(new, torch.tensor(list(BLENDED_STATES)))
    grafting = new == _S.GRAFTING
    state.alpha.copy_(torch.where(grafting, ramp, full.float()))
    state.grafting.enter(grafting.nonzero().flatten().numpy())
    state.changed()
    return state


def _check(rows: Tensor, alpha: Tensor) -> None:
    wrong = (rows[:, 0] < 0) | (rows[:, 0] >= len(Phase1State)) | (rows[:, 1:] < -1).any(1)
    wrong |= (rows[:, 2:] < 0).any(1) | (rows >= 2**31).any(1)
    wrong |= ~torch.isin(rows[:, 3], torch.tensor(list(STRATEGIES)))
    if alpha.shape != rows.shape[:1]:
        raise ConfigError(f"alpha has shape {tuple(alpha.shape)} for {len(rows)} seeds")
    wrong |= ~((alpha >= 0) & (alpha <= 1))
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ConfigError(
            f"seed {first} of the Phase 1 table is {rows[first].tolist()}, alpha {alpha[first]:g}",
            "states are 0..4, blueprints -1 or more, counts 0 or more, strategies known, alpha in "
            "[0, 1]",
        )
