"""Keyed random numbers against SplitMix64 written in plain Python integers."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_ray.keyed_random import (
    keyed_bits,
    keyed_integers,
    keyed_uniform,
    reseed,
    stream_key,
)

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
keys = st.integers(-(2**63), 2**63 - 1)


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def plain_bits(key: int, row: int, count: int) -> list[int]:
    start = mix((row * GOLDEN + key) & MASK)
    return [mix((start + i * GOLDEN) & MASK) for i in range(1, count + 1)]


def test_mixing_is_splitmix64() -> None:
    # first outputs of the published generator for seed 1234567
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [mix((1234567 + i * GOLDEN) & MASK) for i in (1, 2, 3)] == published


@settings(max_examples=60, deadline=None)
@given(key=keys, row=st.integers(0, 2**47), count=st.integers(1, 9))
def test_bits_are_those_of_plain_integers(key: int, row: int, count: int) -> None:
    bits = keyed_bits(key, torch.tensor([row]), count)[0].tolist()
    assert [b & MASK for b in bits] == plain_bits(key, row, count)


@settings(max_examples=40, deadline=None)
@given(key=keys, rows=st.lists(st.integers(0, 2**40), min_size=1, max_size=8))
def test_a_row_does_not_depend_on_its_neighbours(key: int, rows: list[int]) -> None:
    together = keyed_bits(key, torch.tensor(rows), 5)
    alone = torch.cat([keyed_bits(key, torch.tensor([row]), 5) for row in rows])
    longer = keyed_bits(key, torch.tensor(rows), 9)
    assert torch.equal(together, alone)
    assert torch.equal(together, longer[:, :5])


@settings(max_examples=40, deadline=None)
@given(key=keys, high=st.integers(1, 10_000))
def test_integers_stay_in_range_and_repeat_for_their_key(key: int, high: int) -> None:
    drawn = keyed_integers(key, 50, high)
    assert drawn.dtype == torch.int64
    assert 0 <= drawn.min() <= drawn.max() < high
    assert torch.equal(drawn, keyed_integers(key, 50, high))


def test_integers_cover_their_range_evenly() -> None:
    counts = torch.bincount(keyed_integers(stream_key("coverage"), 10_000, 10), minlength=10)
    assert counts.min() > 850  # 5 standard deviations below 1000
    assert counts.max() < 1150


def test_uniform_numbers_fill_the_unit_interval() -> None:
    drawn = keyed_uniform(stream_key("uniform"), torch.arange(100), 100)
    assert drawn.dtype == torch.float32
    assert 0.0 <= drawn.min() < 0.001
    assert 0.999 < drawn.max() < 1.0
    assert abs(drawn.mean() - 0.5) < 0.02
    assert abs(drawn.var() - 1 / 12) < 0.005


def test_a_stream_key_is_the_start_of_the_sha256_of_its_parts() -> None:
    digest = hashlib.sha256(b"7/batch/12").digest()
    assert stream_key(7, "batch", 12) == int.from_bytes(digest[:8], "little", signed=True)


def test_streams_of_other_names_differ() -> None:
    names = [(0, "batch", 1), (0, "batch", 2), (1, "batch", 1), (0, "host", 1)]
    assert len({stream_key(*name) for name in names}) == len(names)


@pytest.mark.parametrize("key", [0, -1, 2**63 - 1, -(2**63)])
def test_reseeding_starts_torchs_generator_anew(key: int) -> None:
    reseed(key)
    first = torch.rand(4)
    torch.rand(9)
    reseed(key)
    assert torch.equal(torch.rand(4), first)
