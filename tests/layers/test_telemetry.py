"""Sampled chunk telemetry against the rows that were sampled."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper_ray.layers.telemetry import (
    EVERY_FORWARD,
    FEATURES_AT_ONCE,
    ROW_STRIDE,
    ChunkTelemetry,
)
from esper_ray.seeds import ChunkManager


def test_the_first_forward_and_every_eighth_are_sampled() -> None:
    made = ChunkTelemetry(4)
    due = [made.due() for _ in range(17)]
    assert [n for n, sampled in enumerate(due) if sampled] == [0, 8, 16]
    made.restart()
    assert made.due()


@given(
    samples=st.integers(1, 300),
    width=st.integers(1, 30),
    offset=st.sampled_from([0.0, 1_000.0]),
    data=st.data(),
)
def test_mean_and_variance_are_those_of_the_rows_that_were_seen(
    samples: int, width: int, offset: float, data: st.DataObject
) -> None:
    chunks = ChunkManager(width, data.draw(st.integers(1, width)))
    made = ChunkTelemetry(width)
    generator = torch.Generator().manual_seed(samples)
    y = torch.randn(samples, width, generator=generator) + offset
    seen = []
    for _ in range(2 * EVERY_FORWARD):
        if made.due():
            stride = max(1, min(ROW_STRIDE, samples // 32))
            seen.append(y[made.forwards // EVERY_FORWARD % stride :: stride])
            made.sample(y)
            made.sample_gradient(y)
    rows = torch.cat(seen).double()
    mean, variance, gradient = made.chunks(chunks.owner, chunks.sizes).double()
    parts = chunks.split(rows)
    for seed, part in enumerate(parts):
        assert float(mean[seed]) == pytest.approx(float(part.mean()), rel=1e-4, abs=1e-4)
        spread = float(part.var(correction=0))
        assert float(variance[seed]) == pytest.approx(spread, rel=2e-3, abs=1e-3)
        strength = float(part.square().mean().sqrt())
        assert float(gradient[seed]) == pytest.approx(strength, rel=1e-4)


def test_what_was_not_sampled_is_not_a_number() -> None:
    chunks = ChunkManager(6, 2)
    assert ChunkTelemetry(6).chunks(chunks.owner, chunks.sizes).isnan().all()


def test_a_layer_wider_than_is_added_up_at_once_is_seen_in_full() -> None:
    width = FEATURES_AT_ONCE + 3
    chunks, made = ChunkManager(width, 2), ChunkTelemetry(width)
    y = torch.randn(8, width, generator=torch.Generator().manual_seed(0))
    assert made.due()
    made.sample(y)
    made.sample_gradient(y)
    mean, variance, gradient = made.chunks(chunks.owner, chunks.sizes)
    for seed, part in enumerate(chunks.split(y)):
        assert float(mean[seed]) == pytest.approx(float(part.mean()), abs=1e-5)
        assert float(variance[seed]) == pytest.approx(float(part.var(correction=0)), rel=1e-3)
        assert float(gradient[seed]) == pytest.approx(float(part.square().mean().sqrt()), rel=1e-4)
