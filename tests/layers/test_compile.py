"""Models with seeds under torch.compile: one graph, whatever the seeds do, and eager's numbers."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper_ray.layers import (
    ChunkedKasminaLayer,
    LayerSeeds,
    Output,
    attach_seeds,
    compiled,
)
from esper_ray.lifecycle import ExtendedLifecycle as S
from tests.builders import move, randomise, same_bits, walk

Compiled = Callable[[Tensor], Any]
BACKENDS = ("eager", "aot_eager")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def linears() -> nn.Module:
    """Two layers with seeds; those of the first read its input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8))
    attach_seeds(model[0], LayerSeeds(10, 4, inputs=6, blueprint_name="input_mlp", hidden=3))
    attach_seeds(model[2], LayerSeeds(8, 4, hidden=3))
    return model


def layers(model: nn.Module) -> list[LayerSeeds]:
    return [module for module in model.modules() if isinstance(module, LayerSeeds)]


def grow(*models: nn.Module, alpha: float = 0.5) -> None:
    """Seeds 0 and 2 of every layer blended in."""
    for model in models:
        for seeds in layers(model):
            walk(seeds, [0, 2], S.STABILIZATION)
            randomise(seeds)
            seeds.state.alpha[[0, 2]] = alpha
            seeds.refresh()


def whole(model: nn.Module, backend: str = "aot_eager") -> Compiled:
    made: Compiled = torch.compile(model, fullgraph=True, backend=backend)
    return made


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(run: Compiled, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and all gradients of one training step."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y = y[0] if isinstance(y, tuple) else y
    y.sin().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()} | {"x": x.grad, "y": y.detach()}
    return {name: value.clone() for name, value in found.items() if value is not None}


def alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


def same_news(model: nn.Module, twin: nn.Module) -> bool:
    """Whether both have sampled and heard the same; forgets what was heard."""
    for one, other in zip(layers(model), layers(twin), strict=True):
        assert same_bits(one.telemetry.totals, other.telemetry.totals)
        assert same_bits(one.telemetry.counted, other.telemetry.counted)
        heard, expected = one.hearing.take(), other.hearing.take()
        if heard is None or expected is None:
            assert heard is expected
            continue
        assert all(same_bits(a, b) for a, b in zip(heard[:5], expected[:5], strict=True))
        assert heard.values == expected.values
    return True


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_compiled_anew_on_the_way_through_the_lifecycle(backend: str) -> None:
    model = linears()
    twin, run = copy.deepcopy(model), whole(model, backend)

    def equal() -> bool:
        x = numbers(5, 6)
        return alike(trained(run, model, x), trained(twin, twin, x)) and same_news(model, twin)

    def each(change: Callable[[LayerSeeds], None]) -> None:
        for seeds in (*layers(model), *layers(twin)):
            change(seeds)

    assert equal()
    with torch.compiler.set_stance("fail_on_recompile"):
        assert equal()
        each(lambda seeds: walk(seeds, [0, 2], S.TRAINING))
        each(randomise)
        assert equal()
        each(lambda seeds: move(seeds, [0, 2], S.TRAINING, S.GRAFTING))
        for alpha in (0.1, 0.7):
            each(lambda seeds, alpha=alpha: seeds.state.alpha.index_fill_(  # type: ignore[misc]
                0, torch.tensor([0, 2]), alpha
            ))  # fmt: skip
            each(LayerSeeds.refresh)
            assert equal()
        each(lambda seeds: move(seeds, [2], S.GRAFTING, S.ROLLED_BACK))
        assert equal()
        each(lambda seeds: walk(seeds, [3], S.FOSSILIZED))
        assert equal()


def test_a_host_whose_seeds_sleep_computes_what_it_did() -> None:
    model = linears()
    bare = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8))
    bare.load_state_dict(model.state_dict(), strict=False)
    found, expected = (
        trained(whole(model), model, numbers(5, 6)),
        trained(bare, bare, numbers(5, 6)),
    )
    assert all(same_bits(found[name], expected[name]) for name in expected)


def test_a_bank_that_grows_is_not_compiled_anew() -> None:
    model = nn.Sequential(nn.Linear(6, 200))
    seeds = attach_seeds(model[0], LayerSeeds(200, 100, hidden=3))
    run, twin = whole(model), copy.deepcopy(model)
    trained(run, model, numbers(5, 6))
    slots = seeds.bank.num_slots
    for each in (seeds, *layers(twin)):
        walk(each, list(range(80)), S.FOSSILIZED)
        randomise(each)
    assert seeds.bank.num_slots > slots
    with torch.compiler.set_stance("fail_on_recompile"):
        found = trained(run, model, numbers(5, 6))
    assert alike(found, trained(twin, twin, numbers(5, 6)))


class Tupled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return self.linear(x), 3


@pytest.mark.parametrize(
    ("build", "output", "shape"),
    [
        (lambda: nn.Conv2d(3, 8, 3, padding=1), Output(feature_dim=1), (2, 3, 5, 4)),
        (lambda: nn.LayerNorm(8), Output(), (2, 3, 8)),
        (Tupled, Output(0), (5, 6)),
    ],
    ids=["convolution", "norm", "tuple"],
)
@pytest.mark.parametrize("blended", [False, True])
def test_other_hosts_give_the_numbers_of_eager(
    build: Callable[[], nn.Module], output: Output, shape: tuple[int, ...], blended: bool
) -> None:
    model = nn.Sequential(build())
    attach_seeds(model[0], LayerSeeds(8, 4, hidden=3), output)
    if blended:
        grow(model)
    twin, x = copy.deepcopy(model), numbers(*shape)
    assert alike(trained(whole(model), model, x), trained(twin, twin, x))


def test_a_layer_with_its_host_inside_and_double_precision_give_the_numbers_of_eager() -> None:
    model = ChunkedKasminaLayer(nn.Linear(6, 8), 4, hidden=3).double()
    grow(model)
    twin, x = copy.deepcopy(model), numbers(5, 6).double()
    assert alike(trained(whole(model), model, x), trained(twin, twin, x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_forwards_may_come_before_their_backwards(backend: str) -> None:
    model = linears()
    grow(model)
    twin = copy.deepcopy(model)
    for run, each in ((whole(model, backend), model), (twin, twin)):
        first, second = run(numbers(5, 6)), run(numbers(5, 6, seed=2))
        second.sin().sum().backward()
        first.cos().sum().backward()
        assert all(p.grad is not None for p in each.parameters())
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.allclose(one.grad, other.grad, atol=1e-6)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = linears()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x) + self.model(x)
        return y


def test_equal_calls_in_one_graph_are_not_taken_for_one() -> None:
    model = Twice()
    grow(model)
    twin, x = copy.deepcopy(model), numbers(5, 6)
    found, expected = trained(whole(model), model, x), trained(twin, twin, x)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forward_leaves_nothing_behind(backend: str) -> None:
    model = linears()
    grow(model)
    run = whole(model, backend)
    y = run(numbers(5, 6))
    assert len(compiled._tickets) == 2
    del y
    gc.collect()
    assert len(compiled._tickets) == 0
    run(numbers(5, 6)).sum().backward()
    gc.collect()
    assert len(compiled._tickets) == 0


def test_a_graph_that_is_kept_can_be_gone_through_again() -> None:
    model = linears()
    grow(model)
    y = whole(model)(numbers(5, 6)).sum()
    y.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    y.backward()
    twice = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.allclose(2 * a, b) for a, b in zip(once, twice, strict=True))


def test_eval_mode_trials_and_copies_give_the_numbers_of_eager() -> None:
    model = linears().eval()
    grow(model)
    run, x = whole(model), numbers(5, 6)
    with torch.no_grad():
        assert same_bits(run(x), model(x))
        with layers(model)[0].under(torch.ones(1, 4)):
            assert same_bits(run(x), model(x))
        twin = copy.deepcopy(model)
        randomise(layers(twin)[0], seed=7)
        assert same_bits(whole(twin)(x), twin(x))
        assert not torch.equal(twin(x), model(x))


def test_seeds_on_a_frozen_host_learn() -> None:
    model = linears()
    model[0].requires_grad_(False)  # type: ignore[index]
    layers(model)[0].requires_grad_(True)
    grow(model)
    twin, run = copy.deepcopy(model), whole(model)
    for f in (run, twin):
        f(numbers(5, 6)).sin().sum().backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or other.grad is None or same_bits(one.grad, other.grad)


def test_a_model_in_pieces_gives_the_numbers_of_eager() -> None:
    model = linears()
    grow(model)
    twin, x = copy.deepcopy(model), numbers(5, 6)
    run = torch.compile(model, fullgraph=False, backend="aot_eager")
    assert alike(trained(run, model, x), trained(twin, twin, x))


def test_nothing_kept_lies_in_memory_that_a_graph_may_use_again() -> None:
    seeds = LayerSeeds(8, 4, inputs=6, blueprint_name="input_mlp", hidden=3)
    walk(seeds, [0, 1, 2, 3], S.TRAINING)  # all of them: their chunks are the output as it is
    h, u, g = numbers(5, 8), numbers(5, 6), numbers(5, 8, seed=2)
    expected = [x.clone() for x in (h, g, u)]
    place = seeds._place
    y, ticket = compiled._blend(h, u, None, place.mark, place.called, True, True)
    for given in (h, u, y):
        given.zero_()
    gh, gu, _ = compiled._backward(g, u, place.mark, ticket)
    for given in (g, gh, gu):
        given.zero_()
    heard = seeds.hearing.take()
    assert heard is not None
    found = [heard.x.flatten(1), heard.g.flatten(1), heard.u]
    assert all(same_bits(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_gives_the_numbers_of_eager_on_a_gpu(mode: str) -> None:
    model = linears().cuda()
    twin, x = copy.deepcopy(model), numbers(32, 6).cuda()
    run: Compiled = torch.compile(model, fullgraph=True, mode=mode)

    def equal() -> bool:
        found, expected = trained(run, model, x), trained(twin, twin, x)
        return found.keys() == expected.keys() and all(
            torch.allclose(found[name], expected[name], atol=1e-4) for name in expected
        )

    assert all(equal() for _ in range(3))
    grow(model, twin)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert all(equal() for _ in range(3))
