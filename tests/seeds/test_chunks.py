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


def chosen(parts: list[int]) -> ChunkManager:
    """Chunks of the sizes that a user gave."""
    return ChunkManager(sum(parts), len(parts), parts)


user_given = st.lists(st.integers(1, 40), min_size=1, max_size=12)
managers = st.one_of(sizes.map(lambda size: ChunkManager(*size)), user_given.map(chosen))


def values(width: int) -> Tensor:
    """Numbers of every kind, negative zero, NaN and infinities included."""
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(width))
    x.flatten()[::7] = -0.0
    x.flatten()[3::11] = torch.nan
    x.flatten()[5::13] = -torch.inf
    return x


@settings(max_examples=60, deadline=None)
@given(manager=managers)
def test_split_then_concatenate_is_identity(manager: ChunkManager) -> None:
    x = values(manager.width)
    assert same_bits(manager.concatenate(manager.split(x)), x)


@settings(max_examples=60, deadline=None)
@given(manager=managers)
def test_pack_then_unpack_is_identity(manager: ChunkManager) -> None:
    x = values(manager.width)
    assert same_bits(manager.unpack(manager.pack(x)), x)


@settings(max_examples=60, deadline=None)
@given(manager=managers)
def test_packed_chunks_are_the_split_ones_padded_with_zeros(manager: ChunkManager) -> None:
    x = values(manager.width)
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


@settings(max_examples=60, deadline=None)
@given(parts=user_given)
def test_user_given_chunks_follow_one_another(parts: list[int]) -> None:
    manager = chosen(parts)
    assert manager.sizes.tolist() == parts
    assert manager.starts.tolist() == [sum(parts[:i]) for i in range(len(parts))]
    bounds = [manager.bounds(i) for i in range(len(parts))]
    assert bounds == [(sum(parts[:i]), sum(parts[: i + 1])) for i in range(len(parts))]
    assert [chunk.shape[-1] for chunk in manager.split(torch.zeros(sum(parts)))] == parts
    assert manager.chunk_width == max(parts)
    assert manager.even == (len(set(parts)) == 1)
    assert manager.valid.sum(1).tolist() == parts


@settings(max_examples=40, deadline=None)
@given(size=sizes)
def test_giving_the_even_sizes_changes_nothing(size: Sizes) -> None:
    even = ChunkManager(*size)
    given_ones = ChunkManager(*size, even.sizes.tolist())
    for (name, one), (_, other) in zip(
        even.named_buffers(), given_ones.named_buffers(), strict=True
    ):
        assert same_bits(one, other), name


@settings(max_examples=40, deadline=None)
@given(manager=managers)
def test_chunks_are_views(manager: ChunkManager) -> None:
    x = torch.zeros(2, manager.width)
    for number, chunk in enumerate(manager.split(x)):
        chunk.fill_(number)
        start, stop = manager.bounds(number)
        assert (x[:, start:stop] == number).all()
    sums = (manager.sizes * torch.arange(manager.num_seeds)).sum()
    assert x.double().sum() == 2 * sums


def test_chunks_cut_through_any_memory_layout() -> None:
    x = torch.randn(5, 3, 10).permute(1, 0, 2)
    manager = ChunkManager(10, 3, (1, 8, 1))
    assert torch.equal(manager.unpack(manager.pack(x)), x)
    assert torch.equal(manager.concatenate(manager.split(x)), x)


def test_chunks_keep_their_numbers_when_the_model_is_cast_and_are_not_saved() -> None:
    manager = ChunkManager(10, 3).half()
    assert manager.starts.tolist() == [0, 4, 7]
    assert manager.valid.dtype == torch.bool
    assert not manager.state_dict()


@settings(max_examples=20, deadline=None)
@given(manager=managers)
def test_every_feature_gets_its_own_gradient_once(manager: ChunkManager) -> None:
    x = torch.ones(2, manager.width, requires_grad=True)
    weight = torch.arange(1.0, manager.width + 1)
    (manager.unpack(manager.pack(x)) * weight).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert torch.equal(x.grad, weight.expand(2, -1))


@pytest.mark.parametrize(("width", "seeds"), [(4, 5), (4, 0), (4, -1), (0, 1), (-3, 1), (0, 0)])
def test_lesson_06_impossible_divisions_name_both_numbers(width: int, seeds: int) -> None:
    with pytest.raises(ConfigError, match=f"{width} features among {seeds} seeds") as caught:
        ChunkManager(width, seeds)
    assert isinstance(caught.value, ValueError)
    assert "choose between 1 and" in caught.value.hint


@pytest.mark.parametrize(
    ("seeds", "parts"),
    [
        (3, []),
        (3, [10]),
        (3, [4, 6]),
        (3, [4, 3, 2, 1]),
        (3, [4, 3, 2]),
        (3, [4, 3, 4]),
        (3, [5, 5, 0]),
        (3, [6, 5, -1]),
        (1, [9]),
    ],
)
def test_sizes_that_do_not_divide_the_layer_are_named(seeds: int, parts: list[int]) -> None:
    told = f"{len(parts)} chunk sizes, sum {sum(parts)}, least {min(parts, default=0)}, do not"
    with pytest.raises(ConfigError, match=f"{told} divide 10 features among {seeds}") as caught:
        ChunkManager(10, seeds, parts)
    assert isinstance(caught.value, ValueError)
    assert "one size of at least 1 per seed" in caught.value.hint


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
