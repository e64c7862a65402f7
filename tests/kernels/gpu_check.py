"""Checks of the kernels on a CUDA device: errors against float64, waits, graphs, compilation."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from esper_ray.bench.layer_case import LayerCase
from esper_ray.layers import ChunkedKasminaLayer
from esper_ray.lifecycle import Budgets, LifecycleManager, Refusal
from esper_ray.seeds import ChunkManager
from tests.kernels.cases import FUSED, LIMITS, Case, error
from tests.kernels.moves import RULES, Life

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    (37, 50, 201, 8, 0.3),
    (64, 32, 128, 8, 1.0),
    (333, 64, 4096, 16, 0.3),
)


def worst_errors() -> dict[str, float]:
    """Largest error over its limit, by kernel, dtype and what was computed."""
    found: dict[str, float] = {}
    for name, dtype, (samples, seeds, width, hidden, share) in itertools.product(
        FUSED, DTYPES, SHAPES
    ):
        ids = torch.randperm(seeds)[: max(1, round(share * seeds))].sort().values
        chunks = ChunkManager(width, seeds)
        case = Case(name, samples, chunks, hidden, 24, ids, dtype, "cuda", seed=len(found))
        ours, right = case.run(in_place=False)
        for key, value in right.items():
            if value.any():
                label = f"{name}/{str(dtype)[6:]}/{'out' if key == 'out' else 'd' + key}"
                found[label] = max(found.get(label, 0.0), error(ours[key], value))
    return found


def never_waits() -> None:
    """Forward and backward, dormant and at work, with waits forbidden."""
    for active in (0.0, 0.1):
        case = LayerCase(64, 400, 100, 8, 128, active, "cuda", torch.bfloat16)
        layer, _ = case.build()
        x, g = case.batches(1)[0], torch.randn(128, 400, device="cuda", dtype=torch.bfloat16)
        layer(x).backward(g)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(10):
                layer(x).backward(g)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def memory_is_flat(cycles: int = 1000) -> set[tuple[int, int]]:
    """(allocated, reserved) bytes at three moments of many births and ends: one pair if flat."""
    host = nn.Linear(64, 4000, device="cuda")
    layer = ChunkedKasminaLayer(host, 1000, hidden=8, device="cuda")
    budgets = Budgets(embargo_epochs=0)
    layer.manager = LifecycleManager(minimum_epochs={}, replanting=True, budgets=budgets)
    x, seen = torch.randn(32, 64, device="cuda"), set()
    for cycle in range(cycles):
        ids = [(cycle * 37 + j) % 1000 for j in range(20)]
        for action in ("germinate", "cancel", "replant"):
            assert set(layer.request(action, ids)) == {Refusal.NONE}
        layer(x).sum().backward()
        layer.zero_grad(set_to_none=True)
        if cycle in (50, cycles // 2, cycles - 1):
            torch.cuda.synchronize()
            seen.add((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    return seen


def tick_agrees(seeds: int = 10_000, epochs: int = 50) -> None:
    """The tick against numpy to the bit, over random moves; after four epochs a graph."""
    for rules in RULES:
        life = Life(seeds, "cuda", rules, seed=1)
        for _ in range(4):  # compiles every form of the kernel
            life.live()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # an error if it waited for anything
            life.ticks.tick()
        life.both = graph.replay
        for _ in range(epochs - 4):
            life.live()
        life.compare()


if __name__ == "__main__":
    tick_agrees()
    print("tick: the same bits as numpy, eager and in a graph")
    errors = worst_errors()
    for label, value in sorted(errors.items()):
        dtype = getattr(torch, label.split("/")[1])
        print(f"{label:40} {value:.2e} {'ok' if value < LIMITS[dtype] else 'OVER'}")
    never_waits()
    print("never waits: ok")
    flat = memory_is_flat()
    print(f"memory: {flat} {'ok' if len(flat) == 1 else 'GROWS'}")
