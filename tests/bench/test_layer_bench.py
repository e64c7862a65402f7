"""What `bench layer` compares is the same arithmetic, and its ratios are what they say."""

from __future__ import annotations

import pytest
import torch

from esper_ray.bench.layer import Floor, measure
from esper_ray.bench.layer_case import LayerCase, PlainLoop
from esper_ray.bench.pairs import Ratio, compare, cpu_seconds
from esper_ray.bench.tick import ready
from esper_ray.errors import ConfigError


@pytest.mark.parametrize("active", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("width", [20, 23])
def test_the_loop_over_seeds_computes_what_the_layer_computes(active: float, width: int) -> None:
    case = LayerCase(6, width, 10, 3, 5, active, "cpu", torch.float32)
    layer, ids = case.build()
    [x] = case.batches(1)
    assert len(ids) == round(active * 10)
    assert torch.allclose(PlainLoop(layer)(x, telemetry=True), layer(x), atol=1e-5)


def test_a_case_is_named_by_device_seeds_chunk_and_share() -> None:
    case = LayerCase(6, 40, 10, 3, 5, 0.1, "cpu", torch.float32)
    assert case.name == "cpu/10/4/10%"


def test_a_ratio_is_the_median_of_pairs_with_an_interval_around_it() -> None:
    found = Ratio.of([1.0] * 31, [1.0 + i / 100 for i in range(31)], extra=False)
    assert found.value == pytest.approx(1.15)
    assert found.low < 1.15 < found.high
    assert found.bare_ms == 1000.0
    assert found.ours_ms == pytest.approx(1150.0)
    added = Ratio.of([2.0] * 5, [0.1] * 5, extra=True)
    assert added.value == added.low == added.high == pytest.approx(1.05)


def test_both_sides_are_called_equally_often() -> None:
    calls: list[str] = []
    compare(lambda: calls.append("a"), lambda: calls.append("b"), cpu_seconds, pairs=4)
    assert calls.count("a") == calls.count("b") == 6


def test_the_floor_counts_the_bytes_that_must_move() -> None:
    case = LayerCase(4096, 64_000, 1_000, 16, 2_048, 1.0, "cuda", torch.bfloat16)
    forward = Floor(case, 3e12, 7.5e14).ratio(training=False)
    moved, operations = 2 * 2_048 * 64_000 * 2, 2 * 2_048 * 4_096 * 64_000
    assert forward == pytest.approx(1 + moved / 3e12 / (operations / 7.5e14))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs without one")
def test_every_seed_of_the_tick_that_is_timed_moves_or_grafts() -> None:
    ticks, batch = ready("cpu", 100)
    ticks.tick()
    assert len(batch.seed_ids) == 50
    assert not ticks.reasons(batch).any()
    grafting = ticks.state.lifecycle_state[1::2] == 3
    assert grafting.all()
    assert (ticks.state.alpha[1::2] > 0).any()  # others drift, and hold theirs


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_without_a_gpu_the_bench_says_so() -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        measure("cuda")
