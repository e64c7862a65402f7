"""Copies of a stage in memory, to go back to when a step has gone wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from esper_ray.growth import snapshot
from esper_ray.growth.seed_trainer import SeedTrainer
from esper_ray.growth.snapshot import Columns, Tensors
from esper_ray.growth.stage import Stage


@dataclass(frozen=True, slots=True)
class _SeedsCopy:
    columns: Columns
    grafting: Columns
    grown: Tensors
    parked: Tensors
    epoch: int
    measured: Tensors


@dataclass(frozen=True, slots=True)
class _Copy:
    host: Tensors
    seeds: Mapping[str, _SeedsCopy]
    losses: tuple[Tensor, ...]


class StageMemory:
    """A stage at the newest epoch boundary and, while steps are tried, before the last two steps.

    Random numbers need no copy: they are pure functions of the step. On a device the host's tensors
    are copied to pinned memory without waiting.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._kept: dict[int, _Copy] = {}

    def before_step(self) -> None:
        """Copy the stage where an epoch begins."""
        if self._stage.step % self._stage.spec.epoch_steps == 0:
            self.keep()

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the stage as it is; copies of older steps but the last are dropped."""
        stage, step = self._stage, self._stage.step
        oldest = [self._kept.pop(kept) for kept in sorted(self._kept) if kept != step - 1]
        room = oldest[0].host if oldest else {}
        self._kept[step] = _Copy(
            _copied(snapshot.live_host_tensors(stage), room),
            {name: _copy_seeds(trainer) for name, trainer in stage.trainers.items()},
            tuple(stage.losses),
        )

    @torch.no_grad()
    def back(self, step: int) -> None:
        """Make the stage what it was before `step`, which must have been kept."""
        stage, kept = self._stage, self._kept[step]
        if any(value.is_pinned() for value in kept.host.values()):
            torch.cuda.synchronize()
        snapshot.load_host(stage, kept.host)
        for name, seeds in kept.seeds.items():
            _load_seeds(stage.trainers[name], seeds)
        stage.losses[:] = kept.losses
        stage.step, stage.at_boundary = step, True


def _copied(live: Tensors, room: Tensors) -> Tensors:
    """Copies on the host, in the memory of older ones where they fit."""
    copies = {}
    for name, value in live.items():
        old = room.get(name)
        if old is None or old.shape != value.shape or old.dtype != value.dtype:
            old = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        copies[name] = old.copy_(value, non_blocking=True)
    return copies


def _copy_seeds(trainer: SeedTrainer) -> _SeedsCopy:
    layer = trainer.layer
    return _SeedsCopy(
        snapshot.state_columns(layer.state),
        snapshot.grafting_columns(layer.state),
        snapshot.grown_tensors(layer),
        snapshot.rollback_tensors(layer),
        layer.epoch,
        {name: value.clone() for name, value in trainer.epoch_tensors().items()},
    )


def _load_seeds(trainer: SeedTrainer, kept: _SeedsCopy) -> None:
    layer = trainer.layer
    snapshot.load_state_columns(layer.state, kept.columns, kept.grafting)
    snapshot.load_rows(layer, kept.grown, kept.parked)
    layer.epoch = kept.epoch
    layer.faults.zero_()
    trainer.resume_epoch({name: value.clone() for name, value in kept.measured.items()})
