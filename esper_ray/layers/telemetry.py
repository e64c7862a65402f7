"""What a layer's chunks look like, sampled so sparsely that watching costs next to nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor

from esper_ray.seeds import ExactBuffers

EVERY_FORWARD: Final = 8
ROW_STRIDE: Final = 8
ENOUGH_ROWS: Final = 32
FEATURES_AT_ONCE: Final = 16_384
"""What a CPU adds up of some rows before it goes on, so that it reads each from memory once."""


class ChunkTelemetry(ExactBuffers):
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
        self.fused = False

    fused: bool
    """Whether the fused kernel adds the sums."""

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
        first, stride = self._cut(y)
        if self.forwards <= EVERY_FORWARD:
            torch.mean(y[first::stride], 0, dtype=torch.float32, out=self.shift)
        total, square, _ = self.totals
        self.counted[0].add_(self._add(y, first, stride, total, square))

    @torch.no_grad()
    def sample_gradient(self, g: Tensor) -> None:
        """Add some rows of the gradient g (samples, width)."""
        self.counted[1].add_(self._add(g, *self._cut(g), None, self.totals[2]))

    def _cut(self, x: Tensor) -> tuple[int, int]:
        """First row and stride of what is sampled of x."""
        stride = max(1, min(ROW_STRIDE, len(x) // ENOUGH_ROWS))
        return self.forwards // EVERY_FORWARD % stride, stride

    def _add(self, x: Tensor, first: int, stride: int, total: Tensor | None, square: Tensor) -> int:
        if self.fused and x.is_contiguous():
            from esper_ray.kernels.blend import add_moments

            return add_moments(x, first, stride, self.shift, total, square)
        rows = x[first::stride]
        ones = square.new_ones(len(rows))
        if total is None:
            for seen, squares in _parts(rows, square):
                squares.addmv_(seen.to(torch.float32).square().t(), ones)
            return len(rows)
        for seen, shift, sums, squares in _parts(rows, self.shift, total, square):
            seen = seen.to(torch.float32) - shift
            sums.addmv_(seen.t(), ones)
            squares.addmv_(seen.square_().t(), ones)
        return len(rows)

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


def _parts(*given: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """All of them cut alike into FEATURES_AT_ONCE features."""
    if given[0].shape[-1] <= FEATURES_AT_ONCE:  # cutting costs a narrow layer as much as adding
        return [given]
    return zip(*(torch.split(x, FEATURES_AT_ONCE, -1) for x in given), strict=True)
