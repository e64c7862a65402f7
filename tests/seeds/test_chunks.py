"""Chunks cover the features once, and go apart and together without losing a bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esper_ray.errors import ConfigError
from esper_ray.seeds import ChunkManager
from tests.builders import same_bits

Sizes = tuple[int, int]
sizes = st.integers(1, 300).flatmap(lambda width: st.tuples(st.just(width), st.integers(1, width)))


def values(width: int) -> Tensor:
    """Numbers of every kind, negative zero, NaN and infinities included."""
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(width))
    x.flatten()[::7] = -0.0
    x.flatten()[3::11] = torch.nan
    x.flatten()[5::13] = -torch.inf
    return x


@settings(max_examples=60, deadline=None)
@given(size=sizes)
def test_split_then_concatenate_is_identity(size: Sizes) -> None:
    x, manager = values(size[0]), ChunkManager(*size)
    assert same_bits(manager.concatenate(manager.split(x)), x)


@settings(max_examples=60, deadline=None)
@given(size=sizes)
def test_pack_then_unpack_is_identity(size: Sizes) -> None:
    x, manager = values(size[0]), ChunkManager(*size)
    assert same_bits(manager.unpack(manager.pack(x)), x)


@settings(max_examples=60, deadline=None)
@given(size=sizes)
def test_packed_chunks_are_the_split_ones_padded_with_zeros(size: Sizes) -> None:
    x, manager = values(size[0]), ChunkManager(*size)
    packed = manager.pack(x)
    for seed_id, chunk in enumerate(manager.split(x)):
        first, end = manager.bounds(seed_id)
        assert same_bits(chunk, x[..., first:end])
        assert same_bits(packed[..., seed_id, : end - first], chunk)
        assert (packed[..., seed_id, end - first :] == 0).all()


@settings(max_examples=60, deadline=None)
@given(size=sizes)
def test_bounds_follow_divmod_and_meet_without_gap(size: Sizes) -> None:
    (width, seeds), manager = size, ChunkManager(*size)
    q, r = divmod(width, seeds)
    bounds = [manager.bounds(i) for i in range(seeds)]
    assert [a for a, _ in bounds] == [i * q + min(i, r) for i in range(seeds)]
    assert [b - a for a, b in bounds] == [q + (i < r) for i in range(seeds)]
    assert (bounds[0][0], bounds[-1][1]) == (0, width)
    assert list(zip(manager.starts.tolist(), manager.sizes.tolist(), strict=True)) == [
        (a, b - a) for a, b in bounds
    ]


def test_ten_features_among_three_seeds() -> None:
    manager = ChunkManager(10, 3)
    assert [manager.bounds(i) for i in range(3)] == [(0, 4), (4, 7), (7, 10)]


def test_chunks_are_views() -> None:
    x = torch.zeros(2, 10)
    ChunkManager(10, 3).split(x)[1].fill_(1.0)
    assert x[:, 4:7].sum() == x.sum() == 6


@settings(max_examples=20, deadline=None)
@given(size=sizes)
def test_every_feature_gets_its_own_gradient_once(size: Sizes) -> None:
    manager = ChunkManager(*size)
    x = torch.ones(2, size[0], requires_grad=True)
    weight = torch.arange(1.0, size[0] + 1)
    (manager.unpack(manager.pack(x)) * weight).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert torch.equal(x.grad, weight.expand(2, -1))


@pytest.mark.parametrize(("width", "seeds"), [(4, 5), (4, 0), (4, -1), (0, 1), (-3, 1), (0, 0)])
def test_lesson_06_impossible_divisions_name_both_numbers(width: int, seeds: int) -> None:
    with pytest.raises(ConfigError, match=f"{width} features among {seeds} seeds") as caught:
        ChunkManager(width, seeds)
    assert isinstance(caught.value, ValueError)
    assert "choose between 1 and" in caught.value.hint


@pytest.mark.parametrize("seed_id", [-1, 3, 100])
def test_lesson_12_an_unknown_seed_has_no_bounds(seed_id: int) -> None:
    with pytest.raises(IndexError, match=f"seed {seed_id} is not in 0..2"):
        ChunkManager(10, 3).bounds(seed_id)


@pytest.mark.parametrize("actual", [9, 11, 20])
@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize("part", [ChunkManager.split, ChunkManager.pack])
def test_lesson_10_features_of_another_width_are_refused(
    part: Callable[[ChunkManager, Tensor], object], seeds: int, actual: int
) -> None:
    with pytest.raises(ValueError, match=f"{actual} features.*10"):
        part(ChunkManager(10, seeds), torch.zeros(2, actual))
