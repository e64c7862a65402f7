"""Which layers the Triton kernels take, and what the others get."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esper_ray.kernels.form import Layout
from esper_ray.layers import ChunkedKasminaLayer
from esper_ray.lifecycle import ExtendedLifecycle as S
from tests.builders import randomise, walk


@pytest.mark.parametrize(
    ("chunk", "hidden", "wide", "bytes_held"),
    [
        (4, 8, False, {2, 4}),
        (16, 16, False, {2, 4}),
        (1, 32, False, {2}),  # sixteen seeds a tile, with 512 hidden units between them
        (1, 408, False, set()),
        (32, 64, True, {2, 4}),
        (32, 408, True, {2, 4}),
        (64, 16, False, {2, 4}),
        (128, 32, True, {2}),
        (300, 8, True, set()),
    ],
)
def test_sizes_that_a_program_holds(
    chunk: int, hidden: int, wide: bool, bytes_held: set[int]
) -> None:
    layout = Layout.of(chunk, hidden, 1)
    assert layout.wide == wide
    assert {size for size in (2, 4) if layout.held(size)} == bytes_held


@pytest.mark.parametrize(("samples", "width"), [(0, 8), (5, 8), (5, 600)])
def test_what_no_kernel_takes_is_computed_by_the_blueprint(samples: int, width: int) -> None:
    torch.manual_seed(0)
    host = nn.Linear(3, width)
    outputs = []
    for kernel in ("triton", "torch"):
        layer = ChunkedKasminaLayer(host, 2, hidden=4, kernel=kernel)
        walk(layer, [0, 1], S.STABILIZATION)
        randomise(layer)
        x = torch.randn(samples, 3, generator=torch.Generator().manual_seed(1))
        outputs.append(layer(x))
        outputs[-1].sum().backward()
    assert outputs[0].shape == (samples, width)
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
