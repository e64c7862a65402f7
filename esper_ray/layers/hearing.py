"""What passes a layer while its seeds are in TRAINING: their chunks, and the gradients there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from esper_ray.layers.telemetry import ChunkTelemetry
from esper_ray.seeds import ChunkManager, ChunkRows


class Heard(NamedTuple):
    """Chunks x and their gradients g, (samples, rows, chunk) both, of the seeds in TRAINING.

    u (samples, inputs) is the host's input where seeds read it, of no features otherwise; the
    squares, scalars, are sums over all features of the layer, `values` of them.
    """

    x: Tensor
    g: Tensor
    u: Tensor
    h_square: Tensor
    g_square: Tensor
    values: int


class Hearing:
    """Collects what passes in the micro-batches of one step."""

    def __init__(self) -> None:
        self._heard: list[Heard] = []

    def listen(
        self,
        h: Tensor,
        u: Tensor | None,
        chunks: ChunkManager,
        rows: ChunkRows,
        telemetry: ChunkTelemetry | None,
        others: bool = False,
    ) -> None:
        """Have the gradient of h (..., width), once it is known, heard and sampled.

        Where `others` need what all features say, it is heard though there are no rows.
        """
        ear: _Ear | None = None
        if len(rows) or others:
            flat = h.detach().reshape(-1, chunks.width)
            read = flat[:, :0] if u is None else u.detach()
            ear = _Ear(chunks.take(flat, rows), read, _square(flat), chunks, rows)

        def hear(g: Tensor | None) -> None:
            if g is None:  # nothing of the loss depends on h
                return
            g = g.detach().reshape(-1, chunks.width)
            if telemetry is not None:
                telemetry.sample_gradient(g)
            if ear is not None:
                self._heard.append(ear.hear(g))

        h.register_hook(hear)  # type: ignore[no-untyped-call]

    def take(self) -> Heard | None:
        """What passed since the last call, all micro-batches together; None if nothing did."""
        heard, self._heard = self._heard, []
        if not heard:
            return None
        x, g, u, h_square, g_square, values = zip(*heard, strict=True)
        return Heard(
            torch.cat(x),
            torch.cat(g),
            torch.cat(u),
            torch.stack(h_square).sum(),
            torch.stack(g_square).sum(),
            sum(values),
        )


@dataclass(frozen=True, slots=True)
class _Ear:
    x: Tensor
    u: Tensor
    h_square: Tensor
    chunks: ChunkManager
    rows: ChunkRows

    def hear(self, g: Tensor) -> Heard:
        taken = self.chunks.take(g, self.rows)
        return Heard(self.x, taken, self.u, self.h_square, _square(g), g.numel())


def _square(x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(x, dtype=wide)
    return norm.square()
