"""Losses under other alphas, without changing anything, and how certain a difference is.

Percentile bootstrap: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from esper_ray.data import Split
from esper_ray.events.messages import Evaluation, EvaluationRequest
from esper_ray.growth.spec import StageSpec
from esper_ray.layers import LayerSeeds

RESAMPLES = 2_000
BATCH = 512
_SEED = 20_250_124


class StageEvaluator:
    """Forward passes of one stage over a split, batch by batch, under many alphas at once."""

    def __init__(self, spec: StageSpec, module: nn.Module, layers: list[LayerSeeds]) -> None:
        self._spec, self._module, self._layers = spec, module, layers
        self._losses: list[Tensor] = []
        self._correct: list[Tensor] = []

    def batches(self, split: Split) -> int:
        """Number of `forward` calls that make up one evaluation."""
        return -(-len(self._positions(split)) // BATCH)

    @torch.no_grad()
    def forward(
        self,
        request: EvaluationRequest,
        split: Split,
        number: int,
        received: Tensor | None,
        here: Callable[[Tensor], Tensor],
    ) -> Tensor | None:
        """Output for batch `number`, (settings * samples, ...); None on the last stage.

        `here` brings a tensor of the split to the stage.
        """
        first = number * BATCH
        x, targets = map(here, split.take(self._positions(split)[first : first + BATCH]))
        if received is None:
            received = x.repeat(request.settings, *(1,) * (x.ndim - 1))
        self._module.eval()
        with under_alphas(self._layers, request.alphas, len(targets)):
            y: Tensor = self._module(received)
        self._module.train()
        if not self._spec.last:
            return y
        targets = targets.repeat(request.settings)
        losses = cross_entropy(y, targets, reduction="none")
        self._losses.append(losses.view(request.settings, -1))
        self._correct.append((y.argmax(1) == targets).view(request.settings, -1))
        return None

    def result(self) -> Evaluation | None:
        """What all batches together say; None but on the last stage."""
        if not self._losses:
            return None
        losses, correct = torch.cat(self._losses, 1), torch.cat(self._correct, 1)
        self._losses, self._correct = [], []
        return summarise(losses, correct)

    def _positions(self, split: Split) -> Tensor:
        return split.spread(self._spec.data.evaluation_samples)


@contextmanager
def under_alphas(
    layers: Iterable[LayerSeeds], alphas: Mapping[str, NDArray[np.float32]], samples: int = 1
) -> Iterator[None]:
    """Have the layers blend by `alphas` (settings, seeds) instead of their own, by layer id.

    Each setting holds for `samples` samples in a row; a single one, for all.
    """
    with ExitStack() as stack:
        for layer in layers:
            if layer.layer_id in alphas:
                first, count = layer.first_seed, layer.state.num_seeds
                own = np.ascontiguousarray(alphas[layer.layer_id][:, first : first + count])
                given = torch.from_numpy(own).to(layer.state.alpha.device)
                stack.enter_context(layer.under(given.repeat_interleave(samples, 0)))
        yield


@functools.lru_cache(maxsize=2)
def _resample_counts(samples: int) -> Tensor:
    """(RESAMPLES, samples) float32: how often each sample is drawn in each resample."""
    generator = torch.Generator().manual_seed(_SEED)
    counts = torch.zeros(RESAMPLES, samples)
    for row in counts:  # one row at a time bounds memory
        drawn = torch.randint(samples, (samples,), generator=generator)
        row += torch.bincount(drawn, minlength=samples)
    return counts


def summarise(losses: Tensor, correct: Tensor) -> Evaluation:
    """Means and intervals from per-sample values (settings, samples); setting 0 is the baseline."""
    losses, samples = losses.double().cpu(), losses.shape[1]
    change = losses - losses[:1]
    mean = change.mean(1)
    low = high = mean
    if len(losses) > 1:
        means = _resample_counts(samples) @ change.float().T / samples  # (resamples, settings)
        low, high = torch.quantile(means, torch.tensor([0.025, 0.975]), dim=0).double()
    return Evaluation(
        loss=losses.mean(1).numpy(),
        accuracy=correct.double().mean(1).cpu().numpy(),
        change=mean.numpy(),
        change_low=np.asarray(low),
        change_high=np.asarray(high),
        samples=samples,
    )
