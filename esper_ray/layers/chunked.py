"""A host layer whose output is divided among seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

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


class Heard(NamedTuple):
    """Base output and its gradient, (samples, ..., width) both, and what blueprints read beside."""

    h: Tensor
    g: Tensor
    u: Tensor


class ChunkedKasminaLayer(nn.Module):
    """Runs `base_layer` and adds alpha times what each seed has grown to its chunk.

    While every alpha is 0 the output and the gradients are the base layer's own, bit for bit.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        num_seeds: int = 1000,
        layer_id: str = "layer",
        device: torch.device | str | None = None,
        *,
        width: int | None = None,
        inputs: int | None = None,
        blueprint_name: str = "bottleneck",
        hidden: int = 32,
        stream: str = "0",
        chunk_sizes: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        width = width if width is not None else getattr(base_layer, "out_features", None)
        if not isinstance(width, int):
            raise ConfigError(
                f"the output width of layer {layer_id!r} is unknown",
                "pass width, the size of the last dimension of its output",
            )
        self.base_layer = base_layer
        self.layer_id = layer_id
        self.stream = f"{stream}/seed/{layer_id}"
        self.chunks = ChunkManager(width, num_seeds, chunk_sizes)
        self.state = ExtendedStateTensor(num_seeds)
        known = getattr(base_layer, "in_features", 0) if inputs is None else inputs
        shape = BlueprintShape(self.chunks.chunk_width, hidden, known)
        self.bank = SeedBank(blueprint(blueprint_name), shape, num_seeds)
        self.manager = LifecycleManager()
        self.epoch = 0
        self.listening = False
        self._heard: list[tuple[Tensor, Tensor]] = []
        self._subscribers: list[Callable[[TransitionBatch], None]] = []
        self._active: tuple[int, Tensor] | None = None
        self._latch = Latch()
        self.to(device)

    def host_parameters(self) -> list[nn.Parameter]:
        """Parameters of the base layer alone."""
        return list(self.base_layer.parameters())

    def seed_buffers(self) -> list[Tensor]:
        """Buffers that belong to seeds, not to the base layer."""
        return [b for part in (self.chunks, self.state, self.bank) for b in part.buffers()]

    # ---- forward -----------------------------------------------------------------------------

    def forward(self, x: Tensor, alpha: Tensor | None = None) -> Tensor:
        """Base output (..., width) with the seeds blended in.

        `alpha` (samples, seeds), or (1, seeds), replaces the seeds' own alphas for this call only;
        samples is the first dimension of the output.
        """
        h: Tensor = self.base_layer(x)
        if self.listening and torch.is_grad_enabled():
            h = self._listen(h, x)
        rows = self.active() if alpha is None else _used(alpha)
        if len(rows) == 0:
            return h
        packed = self.chunks.pack(h)  # (..., seeds, chunk)
        delta = self.bank.delta(packed.index_select(-2, rows), x, rows)
        if alpha is None:
            blended = self.state.alpha.index_select(0, rows)[:, None] * delta
        else:
            blended = _mix(alpha.index_select(-1, rows), delta)
        return self.chunks.unpack(packed.index_add(-2, rows, blended.to(packed.dtype)))

    def active(self) -> Tensor:
        """Ids of the seeds whose alpha is above 0; made anew only after a change."""
        version = self.state.version
        if self._active is None or self._active[0] != version:
            ids = np.flatnonzero(self.state.view().alpha > 0)
            self._active = version, torch.from_numpy(ids).to(self.state.alpha.device)
        return self._active[1]

    def _listen(self, h: Tensor, x: Tensor) -> Tensor:
        if h.requires_grad:
            h.retain_grad()
        else:
            h = h.detach().requires_grad_()
        self._heard.append((h, x.detach() if self.bank.kind.reads_input() else h.detach()))
        return h

    def take_heard(self) -> Heard | None:
        """What passed since the last call, all micro-batches together; None if nothing did."""
        heard = [(h.detach(), h.grad, u) for h, u in self._heard if h.grad is not None]
        self._heard = []
        return Heard(*(torch.cat(part) for part in zip(*heard, strict=True))) if heard else None

    # ---- lifecycle ---------------------------------------------------------------------------

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
        self.bank.reset(born, self.state.generation[born], self.stream)
        self.bank.park(rows(_S.GRAFTING))
        self.bank.bring_back(rows(_S.ROLLED_BACK))
        self.bank.drop_copies(rows(_S.FOSSILIZED))
        self.bank.forget(rows(_S.CULLED, _S.CANCELLED, _S.DORMANT))

    def subscribe(self, tell: Callable[[TransitionBatch], None]) -> None:
        """Have `tell` called with the applied rows of every batch, after they have changed."""
        self._subscribers.append(tell)

    def request(self, action: str, seed_ids: Sequence[int]) -> list[Refusal]:
        """Judge and make a change of some seeds by `manager`; Refusal.NONE where it was made.

        For a layer outside a run: in a run ask the Runtime, which logs it. Actions are those of
        `lifecycle.ACTIONS`, ConfigError for another. Gates that need a measurement stay shut here.
        """
        ids = np.asarray(seed_ids, dtype=np.int64)
        known = (ids >= 0) & (ids < self.state.num_seeds)
        decided = self.manager.judge(self._requests(action, np.where(known, ids, 0)))
        reason = np.where(known, decided.reason, Refusal.UNKNOWN_SEED)
        batch = transition_batch(decided, PolicySettings(), number=0, epoch=self.epoch)
        rows = np.flatnonzero(reason == Refusal.NONE)
        _, reason[rows] = self.apply_transitions(batch.take(rows))
        return [Refusal(code) for code in reason.tolist()]

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


def _used(alpha: Tensor) -> Tensor:
    return (alpha > 0).any(0).nonzero().flatten()


def _mix(alpha: Tensor, delta: Tensor) -> Tensor:
    """alpha (samples, rows) times delta (samples, ..., rows, chunk); 0 where alpha is 0."""
    middle = (1,) * (delta.ndim - 3)
    weight = alpha.reshape(alpha.shape[0], *middle, alpha.shape[-1], 1)
    return torch.where(weight > 0, weight * delta, torch.zeros((), device=delta.device))
