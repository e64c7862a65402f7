"""Checks of the kernels on a CUDA device: errors against float64, waits, graphs, compilation."""

from __future__ import annotations

import itertools

import torch

from esper_ray.bench.layer_case import LayerCase
from esper_ray.seeds import ChunkManager
from tests.kernels.cases import FUSED, LIMITS, Case, error

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


if __name__ == "__main__":
    errors = worst_errors()
    for label, value in sorted(errors.items()):
        dtype = getattr(torch, label.split("/")[1])
        print(f"{label:40} {value:.2e} {'ok' if value < LIMITS[dtype] else 'OVER'}")
    never_waits()
    print("never waits: ok")
