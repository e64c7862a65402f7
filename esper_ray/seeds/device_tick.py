"""Moves and epochs of a layer's state made by the device that holds it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from esper_ray.errors import ConfigError
from esper_ray.events.messages import GraftingSignals, TransitionBatch
from esper_ray.grafting import BIRTH, COLUMNS, STRATEGIES, GraftingSettings
from esper_ray.kernels import tick as kernel
from esper_ray.lifecycle import ExtendedLifecycle, below
from esper_ray.seeds.rows import repeated
from esper_ray.seeds.state_tensor import ExtendedStateTensor


class DeviceTick:
    """A state's `compare_and_set` and `advance` as launches on its own buffers.

    From here to `settle` the state is the device's: its host faces are as they were and nobody
    else may write it. `tick` is what a CUDA graph may hold; `ask` and `sense` fill its input.
    ConfigError if strategies are registered that the kernel does not know.
    """

    def __init__(self, state: ExtendedStateTensor, settings: GraftingSettings) -> None:
        named = tuple(STRATEGIES[number].name for number in sorted(STRATEGIES))
        if named != kernel.STRATEGIES or sorted(STRATEGIES) != list(range(len(named))):
            known, found = ", ".join(kernel.STRATEGIES), ", ".join(named)
            raise ConfigError(
                f"the tick on a device knows {known}, not {found}", "advance the state on the host"
            )
        self.state = state
        buffers = (state.get_buffer(name) for name in kernel.Columns._fields)
        self.tick = kernel.Tick(kernel.Columns(*buffers), rules_of(settings))
        self._remember()

    def _remember(self) -> None:
        memory, ids = self.state.grafting, self.state.grafting.seed_ids
        for names, dense in self._parts():
            table = np.empty((len(names), self.state.num_seeds), COLUMNS[names[0]])
            for row, name in enumerate(names):
                table[row] = BIRTH[name]
                table[row, ids] = memory[name]
            dense.copy_(torch.from_numpy(table))

    def _parts(self) -> tuple[tuple[tuple[str, ...], torch.Tensor], ...]:
        tick = self.tick
        return (
            (kernel.FLOATS, tick.floats),
            (kernel.SHORTS, tick.shorts),
            (kernel.BYTES, tick.bytes),
        )

    def ask(self, batch: TransitionBatch) -> None:
        """Ask for the moves of a batch; ValueError for an unknown seed or one named twice."""
        ids = batch.seed_ids
        if not below(ids, self.state.num_seeds).all() or repeated(ids).any():
            raise ValueError("a tick has one move per seed of its layer: refuse other rows first")
        if np.equal(batch.target, -1).any():
            raise ValueError("target -1 asks for no move: refuse such rows first")
        asked = np.full((len(kernel.ASKED), self.state.num_seeds), -1, np.int32)
        for row, name in enumerate(kernel.ASKED):
            asked[row, ids] = getattr(batch, name)
        self.tick.asked.copy_(torch.from_numpy(asked))
        self.tick.epoch.fill_(batch.epoch)

    def sense(self, signals: GraftingSignals) -> None:
        """What the strategies read in the next epoch; NaN for seeds that are not named."""
        sensed = np.full((len(kernel.SIGNALS), self.state.num_seeds), np.nan)
        for row, name in enumerate(kernel.SIGNALS):
            sensed[row, signals.seed_ids] = getattr(signals, name)
        self.tick.signals.copy_(torch.from_numpy(sensed))

    def reasons(self, batch: TransitionBatch) -> NDArray[np.uint8]:
        """(rows,) Refusal code of each row of the batch that was asked last; waits."""
        reason: NDArray[np.uint8] = self.tick.reason.cpu().numpy()
        return reason[batch.seed_ids]

    def settle(self) -> None:
        """Give the state back to the host, with all that grafting remembers; waits."""
        state = self.state
        state.changed()
        [ids] = np.nonzero(state.host("columns")[state.LIFECYCLE_STATE] == _GRAFTING)
        arrays = {"seed_id": ids.astype(COLUMNS["seed_id"])}
        for names, dense in self._parts():
            table = dense.cpu().numpy()
            arrays |= {n: table[row, ids].astype(COLUMNS[n]) for row, n in enumerate(names)}
        state.grafting.load(arrays)


_GRAFTING = int(ExtendedLifecycle.GRAFTING)


def rules_of(settings: GraftingSettings) -> kernel.Rules:
    """What the kernel is compiled for."""
    selection = settings.selection
    return kernel.Rules(
        ramp_epochs=settings.ramp_epochs,
        drift_threshold=float(settings.drift_threshold),
        pause_epochs=settings.pause_epochs,
        goes_on=settings.resume == "continue",
        momentum_factor=float(settings.momentum_factor),
        adaptive_drift=float(settings.adaptive_drift),
        adaptive_delta=float(settings.adaptive_delta),
        check_every=settings.check_every,
        loss_variance_max=float(settings.loss_variance_max),
        gradient_norm_max=float(settings.gradient_norm_max),
        accuracy_variance_max=float(settings.accuracy_variance_max),
        switch=selection.mode == "performance",
        improving_delta=float(selection.improving_delta),
        improving_epochs=selection.improving_epochs,
        cooldown_epochs=selection.cooldown_epochs,
    )
