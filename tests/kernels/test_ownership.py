"""A gradient may be written over only where nobody else holds it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from esper_ray.kernels import ownership
from esper_ray.kernels.ownership import Holders, unshared

FOUND: list[Holders | None] = []
KEPT: list[object] = []


def watch(x: Tensor) -> Tensor:
    return ownership.watch(x, FOUND)


def backward(loss: Tensor, gradient: Tensor | None = None) -> None:
    loss.backward(gradient)  # type: ignore[no-untyped-call]


def hooked(a: Tensor) -> None:
    y = watch(a)
    y.register_hook(KEPT.append)  # type: ignore[no-untyped-call]
    backward((y * 2).sum())


def viewed(a: Tensor) -> None:
    y = watch(a)
    y.register_hook(lambda g: KEPT.append(g.view(-1)))  # type: ignore[no-untyped-call]
    backward((y * 2).sum())


GIVEN = torch.ones(4, 3)
SHARED: dict[str, Callable[[Tensor], None]] = {
    "given": lambda a: backward(watch(a), GIVEN),
    "residual": lambda a: backward(((a * 1 + watch(a)) * 2).sum()),
    "residual in views": lambda a: backward(((a.view(12) + watch(a).view(12)) * 2).sum()),
    "a hook": hooked,
    "a view in a hook": viewed,
}
OWN: dict[str, Callable[[Tensor], None]] = {
    "product": lambda a: backward((watch(a) * 2).sum()),
    "relu": lambda a: backward(watch(a).relu().sum()),
    "linear": lambda a: backward((watch(a) @ torch.ones(3, 2)).sum()),
    # The other branch is done by then: what was made last goes backward first.
    "residual first": lambda a: backward(((watch(a) + a * 1) * 2).sum()),
    "two uses": lambda a: backward((watch(a) * 2 + watch(a) * 3).sum()),
}


@pytest.mark.parametrize("how", SHARED)
def test_a_gradient_that_someone_holds_is_shared(how: str) -> None:
    FOUND.clear()
    KEPT.clear()
    SHARED[how](torch.randn(4, 3, requires_grad=True) * 1)
    assert list(map(unshared, FOUND)) == [False]


@pytest.mark.parametrize("how", OWN)
def test_a_gradient_that_nobody_holds_may_be_written_over(how: str) -> None:
    FOUND.clear()
    OWN[how](torch.randn(4, 3, requires_grad=True) * 1)
    assert set(map(unshared, FOUND)) == {True}
