"""A host in parts: which ones can be split, and that the parts make up the whole."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from esper_ray.growth.shard import LayerPart, Shard, split_host, why_whole
from esper_ray.layers import LayerSeeds, Output, attach_seeds
from esper_ray.layers.columns import Border, split_border

SHARDS = 3


class Loopback:
    """Shards in threads of one process."""

    def __init__(self, index: int, board: list[Tensor | None], barrier: threading.Barrier) -> None:
        self.index, self._board, self._barrier = index, board, barrier

    def gather(self, name: str, own: Tensor) -> list[Tensor]:
        assert name
        self._board[self.index] = own.detach().clone()
        self._barrier.wait(10)
        parts = [part for part in self._board if part is not None]
        self._barrier.wait(10)
        return parts


HOSTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(6, 11), (5, 6), -1),
    "no bias": (lambda: nn.Linear(6, 11, bias=False), (5, 3, 6), -1),
    "activated": (lambda: nn.Sequential(nn.Linear(6, 11), nn.GELU()), (5, 6), -1),
    "conv1d": (lambda: nn.Conv1d(6, 11, 3, padding=1), (5, 6, 7), 1),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(6, 11, 3), nn.ReLU()), (2, 6, 5, 4), 1),
}


@pytest.mark.parametrize("name", HOSTS)
def test_parts_put_out_and_learn_what_the_whole_does(name: str) -> None:
    build, shape, dim = HOSTS[name]
    torch.manual_seed(3)
    whole = build().double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = whole(x)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    board: list[Tensor | None] = [None] * SHARDS
    barrier = threading.Barrier(SHARDS)
    hosts = []
    for index in range(SHARDS):
        torch.manual_seed(3)
        host = build().double()
        part = LayerPart.of(11, 4, None, Shard(index, SHARDS))
        seeds = LayerSeeds(
            part.width,
            part.seeds,
            chunk_sizes=part.sizes,
            chunk_width=part.chunk_width,
            first_seed=part.first,
        )
        split_host(host, part.rows)
        attach_seeds(host, seeds, Output(feature_dim=dim))
        shards = Loopback(index, board, barrier)
        split_border(host, Border("layer", shards, part.rows.start, dim))
        hosts.append(host)

    def run(host: nn.Module) -> tuple[Tensor, Tensor]:
        own = x.detach().clone().requires_grad_()
        out = host(own)
        (out * weight).sum().backward()
        assert own.grad is not None
        return out.detach(), own.grad

    with ThreadPoolExecutor(SHARDS) as pool:
        results = list(pool.map(run, hosts))
    for out, gradient in results:
        assert torch.allclose(out, y.detach(), rtol=0, atol=1e-12)
        assert x.grad is not None
        assert torch.allclose(gradient, x.grad, rtol=0, atol=1e-12)
        assert torch.equal(gradient, results[0][1])  # on every shard the same bits
    for parameter, expected in whole.named_parameters():
        parts = [dict(host.named_parameters())[parameter].grad for host in hosts]
        joined = torch.cat([part for part in parts if part is not None])
        assert expected.grad is not None
        assert torch.allclose(joined, expected.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("host", "why"),
    [
        (nn.Linear(3, 4), ""),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Dropout()), ""),
        (nn.LayerNorm(4), "a LayerNorm has no rows to divide"),
        (nn.Conv1d(4, 4, 1, groups=2), "its channels are in groups"),
        (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), "looks at several features"),
        (nn.Sequential(nn.Linear(3, 4), nn.PReLU(4)), "looks at several features"),
        (nn.Sequential(), "a Sequential has no rows"),
    ],
)
def test_a_host_that_cannot_be_split_says_why(host: nn.Module, why: str) -> None:
    told = why_whole(host)
    assert why in told if why else not told


def test_the_parts_of_a_layer_are_all_of_it() -> None:
    for shards in range(1, 6):
        parts = [LayerPart.of(23, 5, [7, 1, 5, 4, 6], Shard(k, shards)) for k in range(shards)]
        assert [part.first for part in parts] + [5] == [0, *(part.last for part in parts)]
        assert all(one.rows.stop == other.rows.start for one, other in pairwise(parts))
        assert [size for part in parts for size in part.sizes] == [7, 1, 5, 4, 6]
        assert {part.chunk_width for part in parts} == {7}
