"""A layer's seeds as rows: their state, their weights, and every way in which both change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from esper_ray.blueprints import BlueprintShape, blueprint
from esper_ray.errors import ConfigError
from esper_ray.events.messages import GraftingSignals, TransitionBatch
from esper_ray.grafting import GraftingSettings
from esper_ray.lifecycle import (
    STEPPED_STATES,
    Decisions,
    ExtendedLifecycle,
    LifecycleManager,
    Refusal,
    Requests,
    move_of,
)
from esper_ray.policy import PolicySettings, transition_batch
from esper_ray.seeds import (
    Applied,
    ChunkManager,
    ExtendedStateTensor,
    Latch,
    LogicalSeed,
    SeedBank,
)

_S = ExtendedLifecycle


class SeedHolder(nn.Module):
    """State and weights of the seeds that divide `width` features; see `LayerSeeds`.

    Of a shard of a layer, `first_seed` is the number of its first seed in the whole layer, and
    `chunk_width` that of the whole layer's widest chunk: with them a seed is born the same.
    """

    def __init__(
        self,
        width: int,
        num_seeds: int,
        layer_id: str,
        *,
        inputs: int = 0,
        blueprint_name: str = "bottleneck",
        hidden: int = 32,
        stream: str = "0",
        chunk_sizes: Sequence[int] | None = None,
        chunk_width: int | None = None,
        first_seed: int = 0,
    ) -> None:
        super().__init__()
        self.layer_id, self.first_seed = layer_id, first_seed
        self.stream = f"{stream}/seed/{layer_id}"
        self.chunks = ChunkManager(width, num_seeds, chunk_sizes, chunk_width)
        self.state = ExtendedStateTensor(num_seeds)
        shape = BlueprintShape(self.chunks.chunk_width, hidden, inputs)
        self.bank = SeedBank(blueprint(blueprint_name), shape, num_seeds)
        self.manager = LifecycleManager()
        self.epoch = 0
        self._subscribers: list[Callable[[TransitionBatch], None]] = []
        self._latch = Latch()
        self.register_buffer("faults", torch.zeros(num_seeds), persistent=False)

    faults: Tensor
    """(seeds,) float32: 1 for a seed that failed since `take_faults`, else 0."""

    def rows_in(self, *states: ExtendedLifecycle) -> Tensor:
        """Ids of the seeds in one of `states`."""
        return torch.from_numpy(self.state.view().rows(*states)).to(self.state.alpha.device)

    def stepped(self) -> Tensor:
        """(slots,) bool: slots of the bank whose weights the optimiser moves."""
        mask = torch.zeros_like(self.bank.parked)
        mask[self.bank.slots(self.rows_in(*STEPPED_STATES))] = True
        return mask

    def seed(self, seed_id: int) -> LogicalSeed:
        """One seed as an agent of its own; IndexError if unknown."""
        return LogicalSeed(self, seed_id)

    def apply_transitions(self, batch: TransitionBatch) -> Applied:
        """Apply what is still current, with what each transition does to the weights."""
        with self._latch:  # the row and what it holds change together
            applied, reason = self.state.compare_and_set(batch)
            done = batch.take(applied)
            self._follow(done)
        if len(done.seed_ids):
            for tell in self._subscribers:
                tell(done)
        return applied, reason

    def _follow(self, done: TransitionBatch) -> None:
        """Give, copy, restore and free weights as the applied rows say."""

        def rows(*states: ExtendedLifecycle) -> Tensor:
            ids = done.seed_ids[np.isin(done.target, states)]
            return torch.from_numpy(ids).to(self.state.alpha.device)

        born = rows(_S.GERMINATED)
        self.bank.reset(born, self.state.generation[born], self.stream, self.first_seed)
        self.bank.park(rows(_S.GRAFTING))
        self.bank.bring_back(rows(_S.ROLLED_BACK))
        self.bank.drop_copies(rows(_S.FOSSILIZED))
        self.bank.forget(rows(_S.CULLED, _S.CANCELLED, _S.DORMANT))

    def give_back(
        self,
        seed_ids: NDArray[np.int64],
        generation: NDArray[Any],
        older: Mapping[str, NDArray[Any]],
        tensors: Mapping[str, Tensor],
    ) -> None:
        """Give seeds that are in ROLLED_BACK older measurements, weights and moments, a row each.

        See `ExtendedStateTensor.give_back` and `SeedBank.tensors`. Alpha stays 0, and error count,
        history and generation as they are. ConfigError, and no change, where one of the seeds is in
        another state or generation.
        """
        with self._latch:
            view = self.state.rows(seed_ids)
            wrong = (view.state != _S.ROLLED_BACK) | (view.generation != generation)
            if wrong.any():
                first = int(np.flatnonzero(wrong)[0])
                raise ConfigError(
                    f"seed {seed_ids[first]} of layer {self.layer_id!r} is in "
                    f"{_S(view.state[first]).name}, generation {view.generation[first]}, "
                    f"its checkpoint is of generation {generation[first]}",
                    "roll back seeds that are in ROLLED_BACK, to checkpoints of the same life",
                )
            self.state.give_back(seed_ids, older)
            self.bank.put(torch.from_numpy(seed_ids).to(self.state.alpha.device), tensors)

    def subscribe(self, tell: Callable[[TransitionBatch], None]) -> None:
        """Have `tell` called with the applied rows of every batch, after they have changed."""
        self._subscribers.append(tell)

    def request(self, action: str, seed_ids: Sequence[int]) -> list[Refusal]:
        """Judge and make a change of some seeds by `manager`; Refusal.NONE where it was made.

        For a layer outside a run: in a run ask the Runtime, which logs it. Actions are those of
        `lifecycle.ACTIONS`, ConfigError for another. Gates that need a measurement stay shut here.
        """
        decided = self.judge(action, seed_ids)
        reason, rows = decided.reason.copy(), np.flatnonzero(decided.accepted)
        batch = transition_batch(decided, PolicySettings(), number=0, epoch=self.epoch)
        _, reason[rows] = self.apply_transitions(batch.take(rows))
        return [Refusal(code) for code in reason.tolist()]

    def judge(self, action: str, seed_ids: Sequence[int]) -> Decisions:
        """What `request` would answer now; changes nothing."""
        ids = np.asarray(seed_ids, dtype=np.int64)
        known = (ids >= 0) & (ids < self.state.num_seeds)
        decided = self.manager.judge(self._requests(action, np.where(known, ids, 0)))
        return decided.refuse(np.flatnonzero(~known), Refusal.UNKNOWN_SEED)

    def _requests(self, action: str, ids: NDArray[np.int64]) -> Requests:
        view, (target, cause) = self.state.rows(ids), move_of(action)
        return Requests(
            layer_id=self.layer_id,
            seed_ids=ids,
            generation=view.generation,
            source=view.state,
            target=np.full(len(ids), target, dtype=np.int32),
            cause=np.full(len(ids), cause, dtype=np.int32),
            epochs_in_state=view.epochs_in_state,
            error_count=view.error_count,
            metrics={
                "alpha": view.alpha.astype(np.float64),
                "epochs_since_end": self.epoch - self.state.last_change(ids).astype(np.float64),
            },
        )

    def advance_epoch(
        self, signals: GraftingSignals, settings: GraftingSettings, epoch: int
    ) -> None:
        """Lifecycle epoch `epoch` ends; `signals` has a row per seed in GRAFTING."""
        if not self.training:
            raise RuntimeError(f"layer {self.layer_id!r} is in eval mode, epochs do not advance")
        self.state.advance(signals, settings)
        self.epoch = epoch

    def refresh(self) -> None:
        """Forget what was derived from the state columns."""
        self.state.changed()
