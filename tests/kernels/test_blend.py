"""The fused kernels, run by Triton's interpreter on a CPU, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esper_ray.seeds import ChunkManager
from tests.kernels.cases import FUSED, LIMITS, Case, error

DEVICE = "cpu"


KINDS = [("triton", torch.float32), ("triton", torch.float16), ("cpu", torch.float32)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kernel, dtype = draw(st.sampled_from(KINDS))
    seeds = draw(st.integers(1, 9))
    width = draw(st.integers(seeds, seeds * 20))
    ids = draw(st.lists(st.integers(0, seeds - 1), min_size=1, unique=True))
    return Case(
        name=draw(st.sampled_from(FUSED)),
        samples=draw(st.integers(1, 70)),
        chunks=ChunkManager(width, seeds),
        hidden=draw(st.integers(1, 19)),
        inputs=draw(st.integers(1, 9)),
        ids=torch.tensor(sorted(ids)),
        dtype=dtype,
        device=DEVICE,
        seed=draw(st.integers(0, 2**31)),
        kernel=kernel,
    )


@settings(max_examples=60, deadline=None)
@given(case=cases(), in_place=st.booleans())
def test_output_and_gradients_are_those_of_float64(case: Case, in_place: bool) -> None:
    found, right = case.run(in_place)
    assert set(found) >= set(right)
    # With few bits a hidden unit near 0 may fall on the other side of ReLU's kink.
    kinked = case.dtype != torch.float32 and case.name in ("bottleneck", "autoencoder")
    for name, value in right.items():
        if value.any() and not (kinked and name != "out"):
            assert error(found[name], value) < LIMITS[case.dtype], name


@pytest.mark.parametrize("sizes", [[1, 8, 3], [16, 32, 48]])
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("kernel", ["triton", "cpu"])
def test_chunks_of_any_sizes_are_blended(kernel: str, name: str, sizes: list[int]) -> None:
    chunks = ChunkManager(sum(sizes), 3, sizes)
    case = Case(name, 33, chunks, 5, 4, torch.tensor([0, 2]), torch.float32, DEVICE, kernel=kernel)
    found, right = case.run(in_place=False)
    for key, value in right.items():
        assert error(found[key], value) < LIMITS[torch.float32], key
    first, end = chunks.bounds(1)
    assert torch.equal(found["out"][:, first:end].double(), right["out"][:, first:end])


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize(("sizes", "hidden"), [([16, 32, 9], 70), ([16, 16, 16], 128)])
def test_more_hidden_units_than_a_program_holds(name: str, sizes: list[int], hidden: int) -> None:
    chunks = ChunkManager(sum(sizes), 3, sizes)
    for ids in ([0, 2], [0, 1, 2]):
        case = Case(name, 133, chunks, hidden, 4, torch.tensor(ids), torch.float32, DEVICE)
        found, right = case.run(in_place=False)
        for key, value in right.items():
            assert error(found[key], value) < LIMITS[torch.float32], (key, ids)


@pytest.mark.parametrize("name", ["bottleneck", "autoencoder", "low_rank"])
@pytest.mark.parametrize(
    ("chunk", "dtype"),
    [(1, torch.float16), (2, torch.float16), (4, torch.float16), (2, torch.float32)],
)
def test_chunks_that_are_words_are_blended(name: str, chunk: int, dtype: torch.dtype) -> None:
    chunks = ChunkManager(70 * chunk, 70)
    for ids in (torch.arange(70), torch.arange(1, 70, 3)):
        for in_place in (False, True):
            case = Case(name, 9, chunks, 3, 4, ids, dtype, DEVICE)
            found, right = case.run(in_place)
            kinked = dtype == torch.float16 and name != "low_rank"
            for key, value in right.items():
                if not (kinked and key != "out"):
                    assert error(found[key], value) < LIMITS[dtype], (key, in_place)


class FromMidWord(Case):
    """A case whose gradient is contiguous, but begins in the midst of a word."""

    def gradient(self, g: Tensor) -> Tensor:
        return torch.cat([g.new_zeros(1), g.flatten()])[1:].view(g.shape)


@pytest.mark.parametrize("share", [1, 3])
@pytest.mark.parametrize("kind", [Case, FromMidWord])
def test_a_listed_seed_of_alpha_0_passes_its_word_on(kind: type[Case], share: int) -> None:
    chunks = ChunkManager(70 * 4, 70)
    ids, idle = torch.arange(0, 70, share), (0, 33, 69)
    for in_place in (False, True):
        case = kind("low_rank", 9, chunks, 3, 4, ids, torch.float16, DEVICE, idle=idle)
        found, right = case.run(in_place)
        for key, value in right.items():
            assert error(found[key], value) < LIMITS[torch.float16], (key, in_place)
        for seed in idle:
            first, end = chunks.bounds(seed)
            for key in ("out", "y"):
                ours, theirs = (v[key][:, first:end].double() for v in (found, right))
                assert torch.equal(ours, theirs), (key, seed)


@pytest.mark.parametrize("sizes", [[2, 1, 2, 1], [3, 1, 2, 3]])
def test_what_follows_a_short_chunk_does_not_reach_it(sizes: list[int]) -> None:
    chunks = ChunkManager(sum(sizes), 4, sizes)
    ids = torch.tensor([0, 1, 3])
    rows = chunks.rows(ids)
    assert len(rows.kept) + len(rows.padding) == len(rows.columns) == 3 * chunks.chunk_width
    for name in ("bottleneck", "low_rank"):
        case = Case(name, 1, chunks, 5, 4, ids, torch.float32, DEVICE, kernel="cpu")
        for in_place in (False, True):
            found, right = case.run(in_place)
            for key, value in right.items():
                assert error(found[key], value) < LIMITS[torch.float32], key
