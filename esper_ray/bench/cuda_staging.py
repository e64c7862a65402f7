"""`python -m esper_ray.bench.cuda_staging`: staging on a CUDA device copies without waiting."""

from __future__ import annotations

import json
import statistics
import time

import torch
from torch import Tensor, nn

from esper_ray.actors.layer_rows import LayerStaging
from esper_ray.bench.checkpoint_case import CheckpointCase
from esper_ray.bench.hardware import hardware
from esper_ray.errors import ConfigError

_STAGINGS = 200


def check() -> dict[str, object]:
    """Times of staging, and how many of the staged copies were torn; RuntimeError if it waits."""
    if not torch.cuda.is_available():
        raise ConfigError("torch sees no CUDA device here", "use a GPU host")
    layer = CheckpointCase().build().to("cuda")
    staging, times, torn = LayerStaging(layer), list[float](), 0
    busy = torch.randn(4_096, 4_096, device="cuda")
    for number in range(_STAGINGS):
        _fill(layer.bank.weights, float(number))
        busy = torch.tanh(busy @ busy)  # the device is behind the host all the time
        if number:  # the first takes memory, for which it may wait
            torch.cuda.set_sync_debug_mode("error")
        began = time.perf_counter()
        staged = staging.stage()
        times.append(time.perf_counter() - began)
        torch.cuda.set_sync_debug_mode("default")
        _fill(layer.bank.weights, -1.0)  # what follows in place must not reach the copy
        if staged is None:
            raise RuntimeError("no buffers were free, though all were given back")
        weights = staged().tensors["weights"]
        torn += not all(_is(weights[name], float(number)) for name in layer.bank.weights)
    ordered = sorted(times[len(times) // 10 :])
    return {
        "hardware": hardware(),
        "stagings": _STAGINGS,
        "torn": torn,
        "p50_ms": statistics.median(ordered) * 1e3,
        "p99_ms": ordered[int(0.99 * len(ordered))] * 1e3,
    }


@torch.no_grad()
def _fill(weights: nn.ParameterDict, value: float) -> None:
    for weight in weights.values():
        weight.fill_(value)


def _is(tensor: Tensor, value: float) -> bool:
    return len(tensor) > 0 and bool((tensor == value).all())


if __name__ == "__main__":
    print(json.dumps(check(), indent=2))
