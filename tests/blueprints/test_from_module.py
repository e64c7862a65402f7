"""A user's module, for all seeds at once, is the module of each seed alone."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from esper_ray.blueprints import (
    BlueprintShape,
    ModuleBlueprint,
    blueprint,
    blueprint_names,
    register_module_blueprint,
    registry,
)
from esper_ray.errors import ConfigError
from esper_ray.layers import ChunkedKasminaLayer
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.seeds import SeedBank
from tests.blueprints.user_modules import MODULES, Adapter, FromInput, Gate
from tests.builders import randomise, same_bits, walk

SHAPE = BlueprintShape(4, 3, 5)


@pytest.fixture
def emptied() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = dict(registry._BY_NAME)
    yield
    registry._BY_NAME.clear()
    registry._BY_NAME.update(before)


def linear(shape: BlueprintShape) -> nn.Module:
    return nn.Linear(shape.chunk, shape.chunk)


def born(
    kind: ModuleBlueprint, rows: list[int], generation: int = 0, stream: str = "s"
) -> SeedBank:
    bank = SeedBank(kind, SHAPE, 6)
    bank.reset(torch.tensor(rows), torch.full((len(rows),), generation).short(), stream)
    return bank


def of(bank: SeedBank, row: int) -> list[Tensor]:
    return [weight[row] for weight in bank.weights.values()]


# ---- together and alone ------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(MODULES),
    chunk=st.integers(1, 5),
    hidden=st.integers(1, 4),
    inputs=st.integers(1, 4),
    rows=st.integers(0, 4),
    samples=st.lists(st.integers(0, 3), max_size=2),
)
def test_all_seeds_at_once_give_what_the_plain_modules_give_gradients_too(
    kind: ModuleBlueprint, chunk: int, hidden: int, inputs: int, rows: int, samples: list[int]
) -> None:
    shape = BlueprintShape(chunk, hidden, inputs)
    modules = [kind.module(shape).double() for _ in range(rows)]
    for module in modules:
        nn.utils.vector_to_parameters(
            torch.randn(sum(p.numel() for p in module.parameters())).double(), module.parameters()
        )
    template = kind.module(shape)
    own = [dict(module.named_parameters()) for module in modules]
    stacked = {
        stored: torch.stack([each[name].detach() for each in own]).requires_grad_()
        if own
        else torch.zeros(0, *value.shape)
        for stored, (name, value) in zip(
            kind.weights(shape), template.named_parameters(), strict=True
        )
    }
    x = torch.randn(*samples, rows, chunk, dtype=torch.float64, requires_grad=True)
    u = torch.randn(*samples, inputs, dtype=torch.float64, requires_grad=True)
    together = kind.forward(stacked, x, u)
    alone = [kind.alone(module, x[..., row, :], u) for row, module in enumerate(modules)]
    assert together.shape == x.shape
    if not rows:
        return
    assert torch.allclose(together, torch.stack(alone, -2), rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(x)
    expected = torch.autograd.grad(
        (torch.stack(alone, -2) * direction).sum(),
        [x, u, *(p for module in modules for p in module.parameters())],
        materialize_grads=True,
    )
    found = torch.autograd.grad(
        (together * direction).sum(), [x, u, *stacked.values()], materialize_grads=True
    )
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)
    for number, gradient in enumerate(found[2:]):
        each = torch.stack(expected[2 + number :: len(stacked)])
        assert torch.allclose(gradient, each, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.name)
def test_chunks_of_unequal_size_are_padded_with_zeros(
    kind: ModuleBlueprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry._BY_NAME, kind.name, kind)
    base = nn.Linear(5, 7)
    layer = ChunkedKasminaLayer(base, 3, blueprint_name=kind.name, hidden=3, chunk_sizes=[4, 1, 2])
    walk(layer, [0, 1, 2], S.FOSSILIZED)
    randomise(layer)
    x = torch.randn(6, 5)
    h = base(x)
    specs, names = kind.weights(layer.bank.shape), []
    expected = []
    for seed, part in enumerate(layer.chunks.split(h)):
        module = kind.module(layer.bank.shape)
        names = [name for name, _ in module.named_parameters()]
        with torch.no_grad():
            for parameter, stored in zip(module.parameters(), specs, strict=True):
                parameter.copy_(layer.bank.weights[stored][seed])
        padded = nn.functional.pad(part, (0, 4 - part.shape[-1]))
        delta = kind.alone(module, padded, x) - (0 if kind.residual else padded)
        expected.append(part + delta[:, : part.shape[-1]])
    assert len(names) == len(specs)
    assert torch.allclose(layer(x), torch.cat(expected, -1), atol=1e-6)


class Heads(nn.Module):
    """Its weights do not show how many heads it has."""

    def __init__(self, shape: BlueprintShape) -> None:
        super().__init__()
        self.heads = shape.hidden
        self.out = nn.Linear(shape.chunk, shape.chunk, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.view(*x.shape[:-1], self.heads, -1)
        mixed = (parts @ parts.transpose(-1, -2)).softmax(-1) @ parts
        out: Tensor = self.out(mixed.flatten(-2))
        return out


class ManyHeads(ModuleBlueprint):
    blueprint_id, name, residual = 9_010, "heads", False

    def module(self, shape: BlueprintShape) -> nn.Module:
        return Heads(shape)


@pytest.mark.parametrize("hidden", [1, 2, 4])
def test_sizes_of_a_module_need_not_show_in_its_weights(hidden: int) -> None:
    kind, shape = ManyHeads(), BlueprintShape(4, hidden)
    for other in (1, 2, 4):
        kind.weights(BlueprintShape(4, other))
    module, x = kind.module(shape), torch.randn(15, 2, 4)
    (stored,) = kind.weights(shape)
    weight = next(module.parameters()).detach()
    together = kind.forward({stored: torch.stack([weight] * 2)}, x, torch.empty(0))
    alone = [module(x[..., row, :]) for row in range(2)]
    assert torch.allclose(together, torch.stack(alone, -2), atol=1e-6)


def test_two_threads_do_not_see_each_others_weights() -> None:
    kind, x, u = Adapter(), torch.randn(8, 2, 4), torch.randn(8, 5)
    names = kind.weights(SHAPE)
    wrong: list[int] = []

    def compute(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        weights = {n: torch.randn(2, *s.shape, generator=generator) for n, s in names.items()}
        first = kind.forward(weights, x, u)
        wrong.extend(1 for _ in range(40) if not torch.equal(kind.forward(weights, x, u), first))

    threads = [threading.Thread(target=compute, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- birth -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.name)
def test_newborn_weights_follow_from_stream_seed_and_generation_alone(
    kind: ModuleBlueprint,
) -> None:
    everyone = born(kind, [0, 1, 2, 3])
    torch.manual_seed(99)
    for rows in ([2], [3, 2, 0], [2, 5]):
        assert all(map(same_bits, of(born(kind, rows), 2), of(everyone, 2)))
    others = [of(everyone, 1), of(born(kind, [2], generation=1), 2)]
    others.append(of(born(kind, [2], stream="t"), 2))
    for other in others:
        assert not all(map(torch.equal, other, of(everyone, 2)))


def test_a_seed_is_born_as_the_modules_own_initialiser_says() -> None:
    bank, one = born(FromInput(), list(range(6))), FromInput().module(SHAPE)
    mix, *out = bank.weights.values()
    assert mix.std().item() == pytest.approx(next(one.parameters()).std().item(), rel=0.4)
    assert not any(weight.any() for weight in out)


def test_a_birth_leaves_the_random_state_alone() -> None:
    kind = Adapter()
    before = torch.get_rng_state()
    born(kind, [0, 1])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_bank_is_planned_without_memory_but_its_module_is_tried() -> None:
    with torch.device("meta"):
        bank = SeedBank(Adapter(), SHAPE, 3)
    assert all(weight.is_meta for weight in bank.parameters())
    assert bank.weights_per_seed == 2 * 4 + 4 * 3 + 3 + 3 * 4 + 4


# ---- registration ------------------------------------------------------------------------------


@pytest.mark.usefixtures("emptied")
def test_a_function_or_a_class_becomes_a_blueprint_and_stays_what_it_is() -> None:
    assert register_module_blueprint("mine", 8_000, zero=["weight", "bias"])(linear) is linear

    @register_module_blueprint("gate", 8_001, reads="both", zero="scale")
    class Mine(Gate):
        """A class of modules."""

    assert issubclass(Mine, nn.Module)
    mine, gate = blueprint("mine"), blueprint("gate")
    assert (mine.blueprint_id, mine.reads, mine.residual) == (8_000, "chunk", True)
    assert (gate.reads, gate.reads_input(), gate.residual) == ("both", True, True)
    assert len(mine.weights(SHAPE)) == 2
    assert gate.weights(SHAPE)
    with pytest.raises(ValueError, match="collides with 'mine', id 8000"):
        register_module_blueprint("mine", 8_002)(linear)


@pytest.mark.usefixtures("emptied")
def test_copies_lead_to_the_registered_blueprint_which_a_process_must_know() -> None:
    register_module_blueprint("mine", 8_000, residual=False)(linear)
    bank = SeedBank(blueprint("mine"), SHAPE, 2)
    stored = pickle.dumps(bank)
    for twin in (copy.deepcopy(bank), pickle.loads(stored)):
        assert twin.kind is bank.kind
        x = torch.randn(3, 2, 4)
        twin.load_state_dict(bank.state_dict())
        assert torch.equal(*(b.delta(x, x, torch.arange(2)) for b in (twin, bank)))
    del registry._BY_NAME["mine"]
    with pytest.raises(ConfigError, match="no blueprint is named 'mine'") as caught:
        pickle.loads(stored)
    assert ", ".join(blueprint_names()) in caught.value.hint
