"""The bootstrap interval, where it is known without a bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from esper_ray.growth.evaluation import _resample_counts, summarise

SAMPLES = 400


def noise(seed: int, samples: int = SAMPLES) -> Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def against(change: Tensor, base: Tensor | None = None) -> tuple[float, float, float]:
    """Mean change and its interval for one setting against the baseline."""
    base = torch.zeros_like(change) if base is None else base
    found = summarise(torch.stack([base, base + change]), torch.zeros(2, len(change)))
    return float(found.change[1]), float(found.change_low[1]), float(found.change_high[1])


def test_no_difference_has_an_interval_of_zero() -> None:
    assert against(torch.zeros(SAMPLES), noise(1)) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("constant", [0.25, -3.0, 1e-3])
def test_a_constant_difference_has_an_interval_of_one_point(constant: float) -> None:
    found = against(torch.full((SAMPLES,), constant))
    assert found == pytest.approx((constant,) * 3, rel=1e-5)


def test_losses_and_accuracy_are_exact_means() -> None:
    losses = torch.tensor([[1.0, 2.0, 6.0], [1.0, 2.0, 3.0]])
    correct = torch.tensor([[True, False, False], [True, True, False]])
    found = summarise(losses, correct)
    assert found.loss.tolist() == [3.0, 2.0]
    assert found.accuracy.tolist() == pytest.approx([1 / 3, 2 / 3])
    assert found.change.tolist() == [0.0, -1.0]
    assert found.samples == 3
    assert found.change_low[0] == found.change_high[0] == 0.0


def test_a_single_setting_has_no_spread() -> None:
    found = summarise(noise(1)[None], torch.ones(1, SAMPLES))
    assert [a.tolist() for a in (found.change, found.change_low, found.change_high)] == [[0.0]] * 3


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_interval_is_that_of_the_normal_distribution(seed: int) -> None:
    change = noise(seed) + 0.1
    mean, low, high = against(change)
    error = float(change.std()) / math.sqrt(SAMPLES)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.2 * error)


def test_nineteen_of_twenty_intervals_hold_the_truth() -> None:
    trials = 100
    held = 0
    for trial in range(trials):
        _, low, high = against(noise(trial, 60) + 0.5)
        held += low <= 0.5 <= high
    assert 0.87 <= held / trials <= 0.99


def test_shared_noise_cancels_because_samples_are_paired() -> None:
    _, low, high = against(torch.full((SAMPLES,), 0.01), base=noise(1) * 1_000)
    assert high - low < 1e-3


def test_the_interval_is_the_same_on_every_machine_and_call() -> None:
    change = noise(4)
    first = against(change)
    _resample_counts.cache_clear()
    torch.manual_seed(99)
    assert against(change) == first


def test_every_resample_has_as_many_samples() -> None:
    counts = _resample_counts(50)
    assert (counts.sum(1) == 50).all()
    assert counts.mean(0).sub(1).abs().max() < 0.15


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_lesson_26_a_loss_that_is_not_a_number_yields_no_bound(bad: float) -> None:
    change = noise(1)
    change[3] = bad
    mean, low, _ = against(change)
    assert not math.isfinite(mean)
    assert not np.isfinite(low)
