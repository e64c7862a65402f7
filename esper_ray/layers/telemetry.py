"""What a layer's chunks look like, sampled so sparsely that watching costs next to nothing."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

EVERY_FORWARD: Final = 8
ROW_STRIDE: Final = 8
ENOUGH_ROWS: Final = 32


class ChunkTelemetry(nn.Module):
    """Sums over sampled rows of a layer's output and of its gradient, per feature.

    Every EVERY_FORWARD-th forward since `restart`, the first included, counts every
    ROW_STRIDE-th row, beginning at another row each time; a small batch is sampled more densely,
    so that ENOUGH_ROWS are seen. `totals` (3, width) float32 are the sums
    of y - shift, of its square and of the squared gradient; the shift, the first sample's mean,
    keeps a variance that is small beside the mean from cancelling. Nothing here waits for a device.
    """

    totals: Tensor
    shift: Tensor
    counted: Tensor
    """(2,) float32: rows of y, rows of the gradient."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name, value in {
            "totals": torch.zeros(3, width),
            "shift": torch.zeros(width),
            "counted": torch.zeros(2),
        }.items():
            self.register_buffer(name, value, persistent=False)
        self.forwards = 0

    def restart(self) -> None:
        """Forget what was sampled."""
        self.forwards = 0
        self.totals.zero_()
        self.counted.zero_()

    def due(self) -> bool:
        """Count one forward; whether it is to be sampled."""
        self.forwards += 1
        return self.forwards % EVERY_FORWARD == 1

    @torch.no_grad()
    def sample(self, y: Tensor) -> None:
        """Add some rows of y (samples, width)."""
        rows = self._some(y)
        if self.forwards <= EVERY_FORWARD:
            torch.mean(rows, 0, out=self.shift)
        rows = rows - self.shift
        ones = rows.new_ones(len(rows))
        self.totals[0] += ones @ rows
        self.totals[1] += ones @ rows.square_()
        self.counted[0] += len(rows)

    @torch.no_grad()
    def sample_gradient(self, g: Tensor) -> None:
        """Add some rows of the gradient g (samples, width)."""
        rows = self._some(g)
        self.totals[2] += rows.new_ones(len(rows)) @ rows.square()
        self.counted[1] += len(rows)

    def _some(self, x: Tensor) -> Tensor:
        stride = max(1, min(ROW_STRIDE, len(x) // ENOUGH_ROWS))
        return x.detach()[self.forwards // EVERY_FORWARD % stride :: stride].to(torch.float32)

    def chunks(self, owner: Tensor, sizes: Tensor) -> Tensor:
        """(3, seeds) mean, variance and rms of the gradient of each chunk, NaN if not sampled.

        `owner` (width,) is the seed of each feature, `sizes` (seeds,) the features of each chunk.
        """
        total, square, gradient = self.totals.double()
        rows, backward = self.counted.double()

        def per_seed(values: Tensor) -> Tensor:
            zeros = torch.zeros(len(sizes), dtype=values.dtype, device=values.device)
            return zeros.index_add(0, owner, values) / sizes

        column_mean = self.shift.double() + total / rows
        mean = per_seed(column_mean)
        within = square / rows - (total / rows).square()
        between = (column_mean - mean.index_select(0, owner)).square()
        variance = per_seed(within.clamp(min=0) + between)
        return torch.stack([mean, variance, per_seed(gradient / backward).sqrt()]).float()
