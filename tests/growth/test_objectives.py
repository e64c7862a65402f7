"""Objectives, feature by feature in plain Python numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from esper_ray.blueprints import blueprint
from esper_ray.errors import ConfigError
from esper_ray.growth.objectives import OBJECTIVES, chunk_mean, local_loss, objective
from esper_ray.seeds import ChunkManager

SAMPLES, K = 3, 0.3


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rms(values: list[float]) -> float:
    return math.sqrt(sum(v * v for v in values) / len(values))


def target_of(name: str, h: Tensor, g: Tensor) -> Tensor:
    h_rms, g_rms = (x.pow(2).mean().sqrt() for x in (h, g))
    return OBJECTIVES[name].target(g, h_rms, g_rms, K)


def loss_of(name: str, h: Tensor, g: Tensor, delta: Tensor, chunks: ChunkManager) -> list[float]:
    """What the code computes for all seeds; delta is (..., width)."""
    rows = torch.arange(chunks.num_seeds)
    target = target_of(name, h, g)
    return local_loss(chunks.pack(delta), chunks.pack(target), chunks, rows).tolist()


@pytest.mark.parametrize("shape", [(SAMPLES,), (SAMPLES, 2)], ids=str)
@pytest.mark.parametrize("width", [12, 10])
def test_gradient_target_is_its_formula(width: int, shape: tuple[int, ...]) -> None:
    chunks = ChunkManager(width, 4)
    h, g, delta = (numbers(*shape, width, seed=s) for s in (1, 2, 3))
    s = rms(h.flatten().tolist()) / (rms(g.flatten().tolist()) + 1e-12)
    expected = []
    for seed in range(4):
        first, end = chunks.bounds(seed)
        pairs = zip(
            delta[..., first:end].flatten().tolist(),
            g[..., first:end].flatten().tolist(),
            strict=True,
        )
        squares = [(d + K * s * gradient) ** 2 for d, gradient in pairs]
        expected.append(sum(squares) / len(squares))
    assert loss_of("gradient_target", h, g, delta, chunks) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("width", [12, 10])
def test_reconstruction_is_the_mean_square_of_b_minus_x(width: int) -> None:
    chunks = ChunkManager(width, 4)
    h, out = numbers(SAMPLES, width, seed=1), numbers(SAMPLES, width, seed=2)
    expected = [
        float((out[:, a:b] - h[:, a:b]).pow(2).mean()) for a, b in map(chunks.bounds, range(4))
    ]
    found = loss_of("reconstruction", h, numbers(SAMPLES, width), out - h, chunks)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_gradient_target_does_not_depend_on_the_scale_of_the_loss(scale: float) -> None:
    chunks = ChunkManager(10, 4)
    h, g, delta = (numbers(SAMPLES, 10, seed=s) for s in (1, 2, 3))
    expected = loss_of("gradient_target", h, g, delta, chunks)
    assert loss_of("gradient_target", h, g * scale, delta, chunks) == pytest.approx(expected, 1e-5)


def test_gradient_target_steps_against_the_gradient_by_k_times_the_rms_of_h() -> None:
    h, g = numbers(SAMPLES, 10, seed=1), numbers(SAMPLES, 10, seed=2)
    target = target_of("gradient_target", h, g)
    assert (target * g < 0).all()
    assert float(target.pow(2).mean().sqrt()) == pytest.approx(K * float(h.pow(2).mean().sqrt()))


def test_a_gradient_of_zero_gives_a_target_of_zero() -> None:
    target = target_of("gradient_target", numbers(2, 4), torch.zeros(2, 4))
    assert (target == 0).all()


def test_means_over_ragged_chunks_leave_the_padding_out() -> None:
    chunks = ChunkManager(10, 4)
    values = chunks.pack(torch.arange(20.0).view(2, 10))
    values[:, ~chunks.valid] = 1e9
    rows = torch.tensor([3, 0])
    assert chunk_mean(values[:, rows], chunks, rows).tolist() == [13.5, 6.0]


@pytest.mark.parametrize(
    ("name", "kind", "fitting"),
    [
        ("reconstruction", "bottleneck", "with 'bottleneck' choose objective 'gradient_target'"),
        ("gradient_target", "autoencoder", "with 'autoencoder' choose objective 'reconstruction'"),
    ],
)
def test_an_objective_that_does_not_fit_names_one_that_does(
    name: str, kind: str, fitting: str
) -> None:
    with pytest.raises(
        ConfigError, match=f"objective '{name}' does not fit blueprint '{kind}'"
    ) as e:
        objective(name, blueprint(kind))
    assert e.value.hint == fitting


def test_fitting_objectives_are_found_and_unknown_ones_refused() -> None:
    assert objective("gradient_target", blueprint("bottleneck")).residual
    assert not objective("reconstruction", blueprint("autoencoder")).residual
    with pytest.raises(ConfigError, match="no objective is named 'magic'") as caught:
        objective("magic", blueprint("bottleneck"))
    assert caught.value.hint == "choose one of: gradient_target, reconstruction"
