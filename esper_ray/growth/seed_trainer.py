"""Trains the seeds of one layer and reports what it saw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper_ray.errors import CorruptError
from esper_ray.events.messages import GraftingSignals, TelemetryBatch, TransitionBatch
from esper_ray.growth.objectives import chunk_mean, local_loss, objective
from esper_ray.growth.slot_adam import gradient_norms, step_rows
from esper_ray.growth.spec import SeedSpec
from esper_ray.layers import LayerSeeds
from esper_ray.layers.columns import Shards, added
from esper_ray.layers.hearing import Heard
from esper_ray.layers.ranges import profiled
from esper_ray.lifecycle import STEPPED_STATES, ExtendedLifecycle

if TYPE_CHECKING:
    from esper_ray.growth.fused_step import FusedStep

_S = ExtendedLifecycle
WORTH_PICKING: Final = 16_384
"""Weights of a bank from which on few slots are stepped faster without the others."""

_TELEMETRY: Final = (
    "local_loss",
    "delta_ratio",
    "chunk_mean",
    "chunk_variance",
    "chunk_gradient",
)


class SeedTrainer:
    """Gives seeds in TRAINING their objective's gradient and steps every seed that may move."""

    def __init__(
        self, layer: LayerSeeds, spec: SeedSpec, epoch_steps: int, shards: Shards | None = None
    ) -> None:
        self.layer, self.spec, self.epoch_steps = layer, spec, epoch_steps
        self._shards = shards
        self._objective = objective(spec.objective, layer.bank.kind)
        self._share = layer.bank.weights_per_seed / max(layer.host_weights, 1)
        self._working = False
        self._fused: FusedStep | None = None
        self.reset_epoch()

    def reset_epoch(self) -> None:
        """Start an epoch: nothing measured yet."""
        self.layer.telemetry.restart()
        self._learned: dict[str, Tensor] = {}
        self.refresh()

    def refresh(self) -> None:
        """Take over the rows' new states after a change; drift and errors count from now."""
        layer, bank = self.layer, self.layer.bank
        self._errors_before = layer.state.view().error_count
        if self._working:  # what failed under evaluation is counted, whatever became of it
            layer.state.count_errors(layer.take_faults())
        view = layer.state.view()
        moving = np.isin(view.state, list(STEPPED_STATES))
        working = np.flatnonzero(moving | (view.alpha > 0))
        self._working = len(working) > 0
        self._training = layer.rows_in(_S.TRAINING)
        self._stepped = layer.stepped()
        self._grafting = layer.rows_in(_S.GRAFTING)
        self._before = self._grafting_weights()
        slots = bank.slots(torch.from_numpy(working).to(bank.slot_of_seed.device))
        large = bank.num_slots * bank.weights_per_seed > WORTH_PICKING
        self._few = slots if large and 2 * len(slots) < bank.num_slots else None
        self._choose_kernel()
        if self._fused is not None and self._working:
            self._norms = self._fused.tell(slots, self._stepped)
        else:
            self._norms = torch.full((bank.num_slots,), torch.nan, device=slots.device)

    def follow(self, applied: TransitionBatch) -> None:
        """Take over transitions; what this epoch has measured of the other seeds stays."""
        errors, ids, before = self._errors_before.copy(), self._grafting, self._before
        norms = self._grafting_norms()
        self.refresh()
        errors[applied.seed_ids[applied.replants]] = 0
        self._errors_before = errors
        stayed, here = torch.isin(ids, self._grafting), torch.isin(self._grafting, ids)
        for name, old in before.items():
            self._before[name][here] = old[stayed]
        self._norms[self.layer.bank.slots(self._grafting[here])] = norms[stayed]

    def _choose_kernel(self) -> None:
        """The layer may have been moved to another device."""
        if self.layer.step_kernel != "triton":
            self._fused = None
        elif self._fused is None:
            from esper_ray.growth.fused_step import FusedStep

            self._fused = FusedStep(self.layer, self.spec.optimizer)

    def _grafting_weights(self) -> dict[str, Tensor]:
        bank = self.layer.bank
        slots = bank.slots(self._grafting)
        return {name: w.detach().index_select(0, slots) for name, w in bank.weights.items()}

    def begin_step(self) -> None:
        """Clear gradients."""
        for weight in self.layer.bank.weights.values():
            weight.grad = None

    def agree(self) -> None:
        """Hear from the other shards whether their seeds need to know how large h and g are.

        Called by all of them, before the first step after the states may have changed.
        """
        if self._shards is not None:
            own = torch.tensor([len(self._training)], device=self._training.device)
            counts = self._shards.gather(f"training of {self.layer.layer_id}", own)
            counts.pop(self._shards.index)
            self.layer.others_train = any(int(count) for count in counts)

    def train_seeds(self) -> None:
        """One local backward for all seeds in TRAINING, on detached inputs and gradients."""
        heard = self.layer.hearing.take()
        if heard is None:
            return
        with profiled(self.layer.layer_id, "train"):
            self._learn(heard)

    def _learn(self, heard: Heard) -> None:
        rows, chunks = self._training, self.layer.chunks
        h_rms, g_rms = self._rms(heard)
        if not len(rows):
            return
        target = self._objective.target(heard.g, h_rms, g_rms, self.spec.k)
        delta = self.layer.delta(heard.x, heard.u, rows)
        losses = local_loss(delta, target, chunks, rows)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        ratio = chunk_mean(delta.detach().pow(2), chunks, rows).sqrt() / (
            chunk_mean(heard.x.pow(2), chunks, rows).sqrt() + 1e-12
        )
        self._learned = {"rows": rows, "local_loss": losses.detach(), "delta_ratio": ratio}

    def _rms(self, heard: Heard) -> tuple[Tensor, Tensor]:
        """Of all features of the layer, whichever shard has them: h and its gradient."""
        values = torch.full_like(heard.h_square, heard.values)
        sums = torch.stack([heard.h_square, heard.g_square, values])
        if self._shards is not None:
            sums = added(self._shards.gather(f"rms of {self.layer.layer_id}", sums))
        h_rms, g_rms = (sums[:2] / sums[2]).sqrt()
        return h_rms, g_rms

    def step(self) -> None:
        """Move the rows whose state allows it; count seeds whose numbers are not finite.

        Where no seed is at work, nothing is computed.
        """
        if self._working:
            with profiled(self.layer.layer_id, "step"):
                self._step()

    def _step(self) -> None:
        if self._fused is not None and (found := self._fused.take()) is not None:
            self._norms = found
            return
        bank = self.layer.bank
        self._norms = norms = gradient_norms(bank, self._few)
        failed = self.layer.take_faults()
        stuck = self._stepped & ~norms.isfinite()
        failed.index_add_(0, bank.seed_of_slot.clamp(min=0), stuck.to(failed.dtype))
        self.layer.state.count_errors(failed > 0)
        step_rows(bank, self._stepped, norms, self.spec.optimizer, self._few)

    def end_epoch(self, epoch: int) -> TelemetryBatch:
        """Advance every seed by one lifecycle epoch and report the epoch."""
        with profiled(self.layer.layer_id, "epoch"):
            return self._end_epoch(epoch)

    def _end_epoch(self, epoch: int) -> TelemetryBatch:
        layer, signals = self.layer, self._signals()
        layer.advance_epoch(signals, self.spec.grafting, epoch)
        view = layer.state.view()
        batch = TelemetryBatch(
            layer_id=layer.layer_id,
            epoch=epoch,
            state=view.state,
            epochs_in_state=view.epochs_in_state,
            generation=view.generation,
            alpha=view.alpha,
            error_count=view.error_count,
            **self._measured(),
            strategy=view.strategy,
            checkpoint_id=layer.state.fetch("columns")[layer.state.CHECKPOINT_ID].copy(),
            last_change=layer.state.last_change(),
            errors=view.error_count - self._errors_before,
            signals=signals,
            parameter_share=self._share,
        )
        self.reset_epoch()
        return batch

    # ---- between two epochs ------------------------------------------------------------------

    def epoch_tensors(self) -> dict[str, Tensor]:
        """What was measured since the epoch began, on the CPU; see `resume_epoch`."""
        layer = self.layer
        found = {f"before/{name}": value for name, value in self._before.items()}
        found |= {f"learned/{name}": value for name, value in self._learned.items()}
        found |= {f"telemetry/{name}": b for name, b in layer.telemetry.named_buffers()}
        found |= {
            "norms": self._grafting_norms(),
            "faults": layer.faults,
            "errors_before": torch.from_numpy(self._errors_before),
            "forwards": torch.tensor(layer.telemetry.forwards),
        }
        return {name: value.detach().cpu() for name, value in found.items()}

    def resume_epoch(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on within an epoch; CorruptError where `tensors` are not those of this layer."""
        layer, device = self.layer, self.layer.faults.device
        self.reset_epoch()
        wanted = {n: v.shape for n, v in self.epoch_tensors().items()}
        given = {n: v.shape for n, v in tensors.items() if not n.startswith("learned/")}
        if wanted != given:
            raise CorruptError(f"what layer {layer.layer_id!r} had measured cannot be read")
        here = {name: value.to(device) for name, value in tensors.items()}
        self._before = {name: here[f"before/{name}"] for name in self._before}
        self._learned = {
            name.removeprefix("learned/"): value
            for name, value in here.items()
            if name.startswith("learned/")
        }
        self._norms[layer.bank.slots(self._grafting)] = here["norms"]
        self._errors_before = tensors["errors_before"].numpy()
        layer.faults.copy_(here["faults"])
        for name, buffer in layer.telemetry.named_buffers():
            buffer.copy_(here[f"telemetry/{name}"])
        layer.telemetry.forwards = int(tensors["forwards"])

    def _measured(self) -> dict[str, NDArray[np.float32]]:
        """Telemetry of the epoch, (seeds,) each, NaN where a seed was not measured."""
        layer = self.layer
        found = {name: _unmeasured(layer.state.num_seeds) for name in _TELEMETRY}
        sampled = layer.telemetry.chunks(layer.chunks.owner, layer.chunks.sizes)
        found.update(zip(_TELEMETRY[2:], sampled.cpu().numpy(), strict=True))
        if self._learned:
            rows = self._learned["rows"].cpu().numpy()
            for name in ("local_loss", "delta_ratio"):
                found[name][rows] = self._learned[name].cpu().numpy()
        return found

    def _signals(self) -> GraftingSignals:
        memory = self.layer.state.grafting
        measured = ("performance_delta", "loss_variance", "accuracy_variance")
        return GraftingSignals(
            seed_ids=memory.seed_ids.astype(np.int64),
            weight_drift=self._drift().cpu().numpy().astype(np.float64),
            gradient_norm=self._grafting_norms().cpu().numpy().astype(np.float64),
            **{name: memory[name].copy() for name in measured},
        )

    def _grafting_norms(self) -> Tensor:
        """(grafting seeds,) gradient norms of the last step; NaN before the first."""
        return self._norms[self.layer.bank.slots(self._grafting)]

    def _drift(self) -> Tensor:
        """(grafting seeds,) relative change of the weights; NaN for those without any before."""
        change = old = torch.zeros(len(self._grafting), device=self._grafting.device)
        for name, weight in self._grafting_weights().items():
            before = self._before[name].flatten(1)
            change = change + (weight.flatten(1) - before).pow(2).sum(1)
            old = old + before.pow(2).sum(1)
        drift = (change / old).sqrt()
        if self.spec.drift_unit == "step":
            drift = drift / self.epoch_steps
        return torch.where(old > 0, drift, torch.nan)


def _unmeasured(seeds: int) -> NDArray[np.float32]:
    return np.full(seeds, np.nan, dtype=np.float32)
