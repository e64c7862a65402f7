"""What every blueprint promises; one of ours joins the suite by being registered."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from esper_ray.blueprints import (
    Blueprint,
    BlueprintShape,
    WeightSpec,
    blueprint,
    blueprint_names,
    register_blueprint,
    registry,
)
from esper_ray.errors import ConfigError
from esper_ray.seeds import SeedBank
from tests.blueprints.user_modules import MODULES

KINDS = [*(blueprint(name) for name in blueprint_names()), *MODULES]
SHAPES = [BlueprintShape(1, 1, 2), BlueprintShape(4, 3, 6), BlueprintShape(5, 8, 1)]
SEEDS = 3

pytestmark = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@pytest.fixture(autouse=True)
def registered(kind: Blueprint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._BY_NAME, kind.name, kind)


def weights(kind: Blueprint, shape: BlueprintShape, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(SEEDS, *spec.shape, generator=generator, dtype=dtype)
        for name, spec in kind.weights(shape).items()
    }


def inputs(shape: BlueprintShape, dtype: torch.dtype, samples: int) -> tuple[Tensor, Tensor]:
    """Chunks and what the host read."""
    generator = torch.Generator().manual_seed(6)
    chunks = torch.randn(samples, SEEDS, shape.chunk, generator=generator, dtype=dtype)
    return chunks, torch.randn(samples, shape.inputs, generator=generator, dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("samples", [0, 1, 7])
def test_output_has_the_shape_of_the_chunk(
    kind: Blueprint, shape: BlueprintShape, samples: int
) -> None:
    x, u = inputs(shape, torch.float32, samples)
    stacked = weights(kind, shape, torch.float32)
    assert kind.forward(stacked, x, u).shape == x.shape
    assert kind.delta(stacked, x, u).shape == x.shape


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_delta_is_what_is_added_to_the_chunk(kind: Blueprint, shape: BlueprintShape) -> None:
    (x, u), stacked = inputs(shape, torch.float64, 4), weights(kind, shape, torch.float64)
    out = kind.forward(stacked, x, u)
    assert torch.equal(kind.delta(stacked, x, u), out if kind.residual else out - x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_lesson_13_a_residual_blueprint_adds_nothing_at_birth(
    kind: Blueprint, dtype: torch.dtype
) -> None:
    bank = SeedBank(kind, BlueprintShape(4, 3, 5), SEEDS)
    rows = torch.arange(SEEDS)
    bank.reset(rows, torch.zeros(SEEDS, dtype=torch.int16), "stream")
    x, u = inputs(bank.shape, dtype, 6)
    delta = bank.to(dtype).delta(x * 100, u * 100, rows)
    assert (delta == 0).all() == kind.residual


def test_a_newborn_can_learn(kind: Blueprint) -> None:
    bank = SeedBank(kind, BlueprintShape(4, 3, 5), SEEDS)
    rows = torch.arange(SEEDS)
    bank.reset(rows, torch.zeros(SEEDS, dtype=torch.int16), "stream")
    x, u = inputs(bank.shape, torch.float32, 6)
    (bank.delta(x, u, rows) - x).pow(2).sum().backward()  # type: ignore[no-untyped-call]
    for row in range(SEEDS):
        assert any(w.grad is not None and w.grad[row].any() for w in bank.weights.values())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_seeds_at_once_is_each_seed_alone(kind: Blueprint, shape: BlueprintShape) -> None:
    (x, u), stacked = inputs(shape, torch.float64, 5), weights(kind, shape, torch.float64)
    together = kind.delta(stacked, x, u)
    for row in range(SEEDS):
        alone = {name: value[row : row + 1] for name, value in stacked.items()}
        expected = kind.delta(alone, x[:, row : row + 1], u)
        assert torch.allclose(together[:, row : row + 1], expected, rtol=1e-12, atol=1e-12)


def test_gradients_of_inputs_and_weights_are_right(kind: Blueprint) -> None:
    shape = BlueprintShape(3, 4, 2)
    stacked = weights(kind, shape, torch.float64)
    names = list(stacked)

    def delta(x: Tensor, u: Tensor, *values: Tensor) -> Tensor:
        return kind.delta(dict(zip(names, values, strict=True)), x, u)

    arguments = [*inputs(shape, torch.float64, 2), *stacked.values()]
    assert torch.autograd.gradcheck(delta, [a.requires_grad_() for a in arguments])


def test_lesson_27_a_seed_reads_what_it_declares_and_its_own_weights_only(kind: Blueprint) -> None:
    shape = BlueprintShape(4, 3, 5)
    x, u = (each.requires_grad_() for each in inputs(shape, torch.float64, 2))
    stacked = {n: w.requires_grad_() for n, w in weights(kind, shape, torch.float64).items()}
    kind.delta(stacked, x, u)[:, 1].sum().backward()  # type: ignore[no-untyped-call]
    own = torch.zeros(2, 4) if x.grad is None else x.grad[:, 1]
    assert own.any() == (kind.reads != "input")
    assert x.grad is None or not x.grad[:, [0, 2]].any()
    assert (u.grad is not None and bool(u.grad.any())) == kind.reads_input()
    for weight in stacked.values():
        assert weight.grad is not None
        assert not weight.grad[[0, 2]].any()


def test_name_and_number_lead_to_one_blueprint(kind: Blueprint) -> None:
    assert blueprint(kind.name) is kind
    assert [k for k in KINDS if k.blueprint_id == kind.blueprint_id] == [kind]


@pytest.mark.parametrize(
    "collide",
    [
        lambda kind: {"name": kind.name, "blueprint_id": 9_999},
        lambda kind: {"name": "newcomer", "blueprint_id": kind.blueprint_id},
    ],
    ids=["name", "number"],
)
def test_a_collision_is_refused(
    kind: Blueprint, collide: Callable[[Blueprint], Mapping[str, object]]
) -> None:
    newcomer = type("Newcomer", (type(kind),), dict(collide(kind)))
    before = blueprint_names()
    with pytest.raises(ValueError, match=f"collides with '{kind.name}', id {kind.blueprint_id}"):
        register_blueprint(newcomer)
    assert blueprint_names() == before


@pytest.mark.parametrize("spec", ["shape", "bound"])
def test_weight_specs_are_sane(kind: Blueprint, spec: str) -> None:
    found: list[WeightSpec] = list(kind.weights(BlueprintShape(6, 2, 3)).values())
    values = {
        "shape": all(size > 0 for s in found for size in s.shape),
        "bound": all(s.bound >= 0 for s in found),
    }
    assert values[spec]


@pytest.mark.parametrize(("chunk", "hidden"), [(0, 3), (4, 0), (-1, 2)])
def test_impossible_sizes_are_refused(kind: Blueprint, chunk: int, hidden: int) -> None:
    with pytest.raises(ConfigError, match=f"chunk {chunk} and hidden {hidden}"):
        kind.weights(BlueprintShape(chunk, hidden, 3))


def test_a_blueprint_that_reads_the_input_needs_one(kind: Blueprint) -> None:
    shape = BlueprintShape(4, 3)
    if kind.reads_input():
        with pytest.raises(ConfigError, match=f"'{kind.name}' reads the host layer's input"):
            kind.weights(shape)
    else:
        assert kind.weights(shape)
