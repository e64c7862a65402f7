"""Trains the seeds of one layer and reports what it saw."""

from __future__ import annotations

import torch
from torch import Tensor

from esper_ray.events.messages import TelemetryBatch
from esper_ray.growth.objectives import chunk_mean, local_loss, objective
from esper_ray.growth.slot_adam import gradient_norms, step_rows
from esper_ray.growth.spec import SeedSpec
from esper_ray.layers import ChunkedKasminaLayer
from esper_ray.lifecycle import ExtendedLifecycle

_S = ExtendedLifecycle


class SeedTrainer:
    """Gives seeds in TRAINING their objective's gradient and steps every seed that may move."""

    def __init__(self, layer: ChunkedKasminaLayer, spec: SeedSpec, epoch_steps: int) -> None:
        self.layer, self.spec, self.epoch_steps = layer, spec, epoch_steps
        self._objective = objective(spec.objective, layer.bank.kind)
        host = sum(p.numel() for p in layer.host_parameters())
        self._share = layer.bank.weights_per_seed / max(host, 1)
        self._training = layer.rows_in(_S.TRAINING)
        self._stepped = layer.stepped()
        self._sample = False
        self._previous: dict[str, Tensor] = {}
        self.reset_epoch()

    def reset_epoch(self) -> None:
        """Start an epoch: nothing measured yet, drift counts from the weights as they are."""
        unmeasured = torch.full((self.layer.state.num_seeds,), torch.nan)
        self._seen = {
            name: unmeasured.clone()
            for name in ("local_loss", "delta_ratio", "mean", "variance", "gradient")
        }
        self._previous = {n: w.detach().clone() for n, w in self.layer.bank.weights.items()}

    def refresh(self) -> None:
        """Take over the rows' new states after a change of the state tensor."""
        self._training = self.layer.rows_in(_S.TRAINING)
        self._stepped = self.layer.stepped()

    def begin_step(self, sample: bool) -> None:
        """Clear gradients; `sample` asks for chunk telemetry in this step."""
        self._sample = sample
        self.layer.listening = sample or len(self._training) > 0
        for weight in self.layer.bank.weights.values():
            weight.grad = None

    def train_seeds(self) -> None:
        """One local backward for all seeds in TRAINING, on detached inputs and gradients."""
        heard = self.layer.take_heard()
        if heard is None:
            return
        h, g = heard
        if self._sample:
            self._observe(h, g)
        rows, chunks = self._training, self.layer.chunks
        if len(rows) == 0:
            return
        target = chunks.pack(self._objective.target(h, g, self.spec.k)).index_select(-2, rows)
        own = chunks.pack(h).index_select(-2, rows)
        delta = self.layer.bank.delta(own, rows)
        losses = local_loss(delta, target, chunks, rows)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        ratio = chunk_mean(delta.detach().pow(2), chunks, rows).sqrt() / (
            chunk_mean(own.pow(2), chunks, rows).sqrt() + 1e-12
        )
        self._seen["local_loss"][rows] = losses.detach()
        self._seen["delta_ratio"][rows] = ratio

    def step(self) -> None:
        """Move the rows whose state allows it; count a gradient that is not finite as an error."""
        norms = gradient_norms(self.layer.bank)
        self.layer.state.count_errors(self._stepped & ~norms.isfinite())
        step_rows(self.layer.bank, self._stepped, norms, self.spec.optimizer)

    def end_epoch(self, epoch: int) -> TelemetryBatch:
        """Advance every seed by one lifecycle epoch and report the epoch."""
        layer, drift = self.layer, self._drift()
        layer.advance_epoch(drift, self.spec.grafting)
        view, seen = layer.state.view(), {k: v.cpu().numpy() for k, v in self._seen.items()}
        batch = TelemetryBatch(
            layer_id=layer.layer_id,
            epoch=epoch,
            state=view.state,
            epochs_in_state=view.epochs_in_state,
            generation=view.generation,
            alpha=view.alpha,
            error_count=view.error_count,
            local_loss=seen["local_loss"],
            delta_ratio=seen["delta_ratio"],
            weight_drift=drift.cpu().numpy(),
            chunk_mean=seen["mean"],
            chunk_variance=seen["variance"],
            chunk_gradient=seen["gradient"],
            pauses=layer.state.pauses.cpu().numpy().copy(),
            parameter_share=self._share,
        )
        self.reset_epoch()
        return batch

    def _observe(self, h: Tensor, g: Tensor) -> None:
        chunks = self.layer.chunks
        rows = torch.arange(chunks.num_seeds, device=h.device)
        packed = chunks.pack(h)
        mean = chunk_mean(packed, chunks, rows)
        self._seen["mean"] = mean
        self._seen["variance"] = chunk_mean((packed - mean[:, None]).pow(2), chunks, rows)
        self._seen["gradient"] = chunk_mean(chunks.pack(g).pow(2), chunks, rows).sqrt()

    def _drift(self) -> Tensor:
        """(seeds,) relative change of the weights over the epoch, per step; NaN for the newborn."""
        change = old = torch.zeros(())
        for name, weight in self.layer.bank.weights.items():
            before = self._previous[name].flatten(1)
            change = change + (weight.detach().flatten(1) - before).pow(2).sum(1)
            old = old + before.pow(2).sum(1)
        drift = (change / old).sqrt() / self.epoch_steps
        return torch.where(old > 0, drift, torch.nan)
