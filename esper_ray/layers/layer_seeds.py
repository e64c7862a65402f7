"""The seeds of one layer: what they blend into its output, and what they hear of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Self

import numpy as np
import torch
from torch import Tensor

from esper_ray.kernels import choose, choose_step
from esper_ray.layers import compiled
from esper_ray.layers.fused import FusedBlend
from esper_ray.layers.hearing import Hearing
from esper_ray.layers.ranges import profiled
from esper_ray.layers.seed_holder import SeedHolder
from esper_ray.layers.telemetry import ChunkTelemetry
from esper_ray.lifecycle import ExtendedLifecycle
from esper_ray.seeds import ChunkRows

_S = ExtendedLifecycle
_log = logging.getLogger(__name__)

BLUEPRINT_FAULTS: Final = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a blueprint, which may be a user's own, can raise without ending the host's training."""


class LayerSeeds(SeedHolder):
    """Seeds that share a layer's output of `width` features.

    `blend` adds alpha times what each seed has grown to its chunk. While every alpha is 0, output
    and gradients are the host's own, bit for bit. `inputs` are the features of the host's input,
    0 where seeds cannot read it; `host_weights` is the number of weights of the host.
    """

    def __init__(
        self,
        width: int,
        num_seeds: int = 1000,
        layer_id: str = "layer",
        *,
        host_weights: int = 0,
        kernel: str = "auto",
        **given: Any,
    ) -> None:
        super().__init__(width, num_seeds, layer_id, **given)
        self.host_weights, self.in_place = host_weights, False
        self._asked_kernel = kernel
        self._fused: FusedBlend | None = None
        self.telemetry = ChunkTelemetry(width)
        self.hearing = Hearing()
        self.others_train = False
        self._trial: Tensor | None = None
        self._reads_input = self.bank.kind.reads_input()
        self._rows: dict[str, ChunkRows] = {}
        self._version = -1
        self._place = compiled.Place(self)
        self._choose_kernel()

    others_train: bool
    """Whether a seed of another shard of this layer is in TRAINING."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._place = compiled.Place(self)  # a copy is called by a graph of its own

    def forward(self, x: Tensor) -> Tensor:
        """x itself, so that a host which runs its children one after the other is not changed."""
        return x

    # ---- blending ----------------------------------------------------------------------------

    def blend(
        self, h: Tensor, u: Tensor | None, alpha: Tensor | None = None, *, in_place: bool = False
    ) -> Tensor:
        """The host's output h (..., width) with the seeds blended in; u is what the host read.

        `alpha` (samples, seeds), or (1, seeds), replaces the seeds' own alphas for this call only;
        samples is the first dimension of h. `in_place` permits to write over h, which nobody may
        look at then. ValueError where h is not of this layer's width.
        """
        if h.shape[-1] != self.chunks.width:
            raise ValueError(
                f"layer {self.layer_id!r} put out {h.shape[-1]} features, but its seeds divide "
                f"{self.chunks.width}"
            )
        if torch.compiler.is_compiling():
            return compiled.blend(self._place, h, u if self._reads_input else None, alpha)
        alpha = self._trial if alpha is None else alpha
        if torch.is_grad_enabled() and self.training:
            with profiled(self.layer_id, "listen"):
                h = self._listen(h, u)
        rows = self.rows("blended") if alpha is None else self.chunks.rows(_used(alpha))
        if len(rows) == 0:
            return h
        with profiled(self.layer_id, "blend"):
            return self._blend(h, u, alpha, rows, in_place)

    def _blend(
        self, h: Tensor, u: Tensor | None, alpha: Tensor | None, rows: ChunkRows, in_place: bool
    ) -> Tensor:
        u = self.bank.read(u)
        if self._fused is not None and alpha is None and self._fused.fits(h):
            return self._fused.blend(h, u, rows, in_place)
        flat = h.reshape(-1, self.chunks.width)
        if alpha is None:
            weight = self.state.alpha.index_select(0, rows.ids)[:, None]
        else:
            weight = _per_sample(alpha.index_select(-1, rows.ids), len(flat))
        delta = self.delta(self.chunks.take(flat, rows), u, rows.ids)
        blended = torch.where(weight > 0, weight * delta, 0.0).to(h.dtype)
        return self.chunks.add(flat, rows, blended).view(h.shape)

    def delta(self, x: Tensor, u: Tensor | None, ids: Tensor) -> Tensor:
        """What seeds `ids` would add at alpha 1 to their chunks x (samples, rows, chunk).

        0, and a fault, for a seed whose output is not finite, and for all where the blueprint
        fails: neither reaches the host.
        """
        try:
            delta = self.bank.delta(_guarded(x), None if u is None else _guarded(u), ids)
        except BLUEPRINT_FAULTS as error:
            _log.warning("layer %s: its blueprint failed: %r", self.layer_id, error)
            self.faults.index_fill_(0, ids, 1.0)
            return torch.zeros_like(x)
        broken = ~torch.isfinite(delta.detach()).all(-1).all(0)
        self.faults.index_copy_(
            0, ids, self.faults.index_select(0, ids).logical_or(broken).to(self.faults.dtype)
        )
        return torch.where(broken[:, None], 0.0, delta)

    def take_faults(self) -> Tensor:
        """(seeds,) float32: 1 for each seed that failed since the last call; on the device."""
        faults = self.faults.clone()
        self.faults.zero_()
        return faults

    @contextmanager
    def under(self, alpha: Tensor) -> Iterator[None]:
        """Blend with `alpha`, as in `blend`, for as long as the context lasts; changes no state."""
        self._trial = alpha
        try:
            yield
        finally:
            self._trial = None

    def _listen(self, h: Tensor, u: Tensor | None) -> Tensor:
        """Sample telemetry and hear what seeds in TRAINING need, where either is due."""
        training, sampled = self.rows("training"), self.telemetry.due()
        if sampled:
            self.telemetry.sample(h.detach().reshape(-1, self.chunks.width))
        if not sampled and len(training) == 0 and not self.others_train:
            return h
        if not h.requires_grad:
            h = h.detach().requires_grad_()
        self.hearing.listen(
            h,
            self.bank.read(u),
            self.chunks,
            training,
            self.telemetry if sampled else None,
            self.others_train,
        )
        return h

    def rows(self, which: str) -> ChunkRows:
        """Chunks of the seeds that are `blended` or in TRAINING (`training`).

        Made anew only after a change of state, by the host alone.
        """
        if self._version != self.state.version:
            view, self._version = self.state.view(), self.state.version
            ids = {
                "blended": np.flatnonzero(view.alpha > 0),
                "training": view.rows(_S.TRAINING),
            }
            device = self.state.alpha.device
            self._rows = {
                name: self.chunks.rows(torch.from_numpy(found).to(device))
                for name, found in ids.items()
            }
        return self._rows[which]

    @property
    def awake(self) -> bool:
        """Whether a seed is blended in, tried or in TRAINING."""
        found = len(self.rows("blended")) + len(self.rows("training"))
        return self._trial is not None or found > 0

    def refresh(self) -> None:
        """Forget what was derived from the state columns."""
        super().refresh()
        self._version = -1

    def _choose_kernel(self) -> None:
        form, device = self.bank.kind.fused, self.faults.device
        self.kernel = choose(self._asked_kernel, form, device)
        self.step_kernel = choose_step(self._asked_kernel, device)
        self._fused = None if self.kernel == "torch" else FusedBlend(self, self.kernel)
        self.telemetry.fused = self.kernel == "triton"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._choose_kernel()
        self._version = -1
        return self


def _guarded(x: Tensor) -> Tensor:
    """x, but what is not finite of the gradient that it passes on becomes 0."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x
    x = x.view_as(x)
    x.register_hook(_finite)  # type: ignore[no-untyped-call]
    return x


def _finite(g: Tensor | None) -> Tensor | None:
    return None if g is None else torch.where(torch.isfinite(g), g, 0.0)


def _used(alpha: Tensor) -> Tensor:
    return (alpha > 0).any(0).nonzero().flatten()


def _per_sample(alpha: Tensor, samples: int) -> Tensor:
    """(1 or samples, rows, 1) from (1 or n, rows), each row n times as samples need it."""
    if len(alpha) > 1:
        alpha = alpha.repeat_interleave(samples // len(alpha), 0)
    return alpha[..., None]
