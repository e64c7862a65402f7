"""A module that no seed can grow is refused before a run starts, with the reason and a remedy."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from esper_ray.blueprints import BlueprintShape, ModuleBlueprint
from esper_ray.errors import ConfigError
from esper_ray.seeds import SeedBank

SHAPE = BlueprintShape(4, 3, 5)
COUNTER = itertools.count()


def kind_of(build: Callable[[BlueprintShape], object], **changes: object) -> ModuleBlueprint:
    members = {
        "blueprint_id": 9_100,
        "name": "mine",
        "residual": False,
        "module": lambda self, shape: build(shape),  # noqa: ARG005 - called as a method
        **changes,
    }
    made: ModuleBlueprint = type("Mine", (ModuleBlueprint,), members)()
    return made


class Does(nn.Module):
    """A linear map and then whatever a test is about."""

    def __init__(self, after: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.map, self.after = nn.Linear(4, 4), after

    def forward(self, x: Tensor) -> object:
        return self.after(self.map(x))


def does(after: Callable[[Tensor], object]) -> Callable[[BlueprintShape], nn.Module]:
    return lambda _: Does(after)


def with_buffer(value: Callable[[], Tensor]) -> nn.Module:
    module = nn.Linear(4, 4)
    module.register_buffer("kept", value(), persistent=False)
    return module


def frozen() -> nn.Module:
    module = nn.Linear(4, 4)
    module.bias.requires_grad_(False)
    return module


def counted() -> nn.Module:
    module = nn.Linear(4, 4)
    nn.init.constant_(module.bias, float(next(COUNTER)))
    return module


def integers() -> nn.Module:
    module = nn.Linear(4, 4)
    module.register_parameter("index", nn.Parameter(torch.zeros(2, dtype=torch.int64), False))
    return module


def slashed() -> nn.Module:
    module = nn.Sequential()
    module.add_module("a/b", nn.Linear(4, 4))
    return module


class Reaches(nn.Module):
    """Declared to read the chunk, but wants the input too."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        return x + u


def branch(y: Tensor) -> Tensor:
    return y if y.sum() > 0 else -y


def either(_: BlueprintShape) -> nn.Module:
    return nn.Linear(4, 4, bias=bool(torch.rand(()) < 0.5))


class Tokens(nn.Module):
    """Mixes the tokens of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        samples, tokens, _ = x.shape
        out: Tensor = self.map(x.mean(1, keepdim=True).expand(samples, tokens, 4))
        return out


def broken(_: BlueprintShape) -> nn.Module:
    raise KeyError("no such size")


@pytest.mark.parametrize(
    ("build", "message", "remedy"),
    [
        (broken, r"Mine cannot build .*chunk=4.*: KeyError: 'no such size'", "shape.chunk"),
        (lambda _: 3, "TypeError: it returned int", "return an nn.Module"),
        (lambda _: nn.Tanh(), "has no parameters", "nn.Parameter"),
        (lambda _: nn.LazyLinear(4), "'weight' .* has no size yet", "BlueprintShape"),
        (lambda _: frozen(), "'bias' .* is frozen", "a buffer"),
        (lambda _: integers(), "'index' .* is int64", "a buffer"),
        (lambda _: slashed(), "'a/b.weight' .* has a / in its name", "another name"),
        (lambda _: counted(), "'bias' .* differs between two births", "torch's default generator"),
        (either, "has other parameters at every birth", "BlueprintShape alone"),
        (lambda _: with_buffer(lambda: torch.rand(2)), "'kept' .* is random", "a parameter"),
        (does(nn.BatchNorm1d(4)), "'after.running_mean' .* changes", "track_running_stats"),
        (lambda _: nn.Linear(5, 4), r"reads 'chunk', fails .*\(16, 4\): Runtime", "are samples"),
        (lambda _: Tokens(), r"fails for a chunk of \(16, 4\)", "tokens are samples"),
        (lambda _: Reaches(), "TypeError: .*missing 1 required .*'u'", "what it reads"),
        (lambda _: nn.Linear(4, 1), r"returns \(16, 1\) for a chunk of \(16, 4\)", "shape.chunk"),
        (does(lambda y: y.mean(0)), r"returns \(4,\) for a chunk of \(16, 4\)", "one tensor"),
        (does(lambda y: (y, y)), r"returns tuple for a chunk of \(16, 4\)", "one tensor"),
        (does(nn.Dropout(0.5)), "all seeds at once: .*random operation", "dropout"),
        (does(lambda y: dropout(y, 0.5)), "all seeds at once: .*random operation", "dropout"),
        (does(lambda y: y + torch.rand(4)), "all seeds at once: .*random operation", "random"),
        (does(branch), "all seeds at once: .*control flow", "branches"),
        (does(lambda y: y.detach()), "no gradient reaches", "what the parameters compute"),
        (does(lambda y: y * 0), "no gradient reaches", "what the parameters compute"),
        (does(lambda y: torch.ones(y.shape)), "no gradient reaches", "parameters compute"),
    ],
)
def test_what_is_wrong_is_said_before_a_bank_is_made(
    build: Callable[[BlueprintShape], object], message: str, remedy: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        SeedBank(kind_of(build), SHAPE, 3)
    assert "'mine'" in caught.value.message
    assert remedy in caught.value.hint
    assert "\n" not in caught.value.message


def test_a_residual_module_must_be_zero_at_birth() -> None:
    with pytest.raises(ConfigError, match="does not return zeros at birth: up to") as caught:
        kind_of(does(nn.Tanh()), residual=True).weights(SHAPE)
    assert "zero=" in caught.value.hint
    kind_of(does(nn.Tanh()), residual=True, zero=("map",)).weights(SHAPE)


def test_a_residual_module_that_is_not_a_number_at_birth_is_not_zero() -> None:
    with pytest.raises(ConfigError, match="up to nan"):
        kind_of(does(lambda y: y / 0), residual=True, zero=("map",)).weights(SHAPE)


def test_too_many_zeros_leave_nothing_to_learn_from() -> None:
    def two(_: BlueprintShape) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 4, bias=False))

    kind_of(two, residual=True, zero=("1",)).weights(SHAPE)
    with pytest.raises(ConfigError, match="no gradient reaches") as caught:
        kind_of(two, residual=True, zero=("0", "1")).weights(SHAPE)
    assert "one layer only" in caught.value.hint


@pytest.mark.parametrize("wanted", ["out", "ma", "map.bia", ""])
def test_an_unknown_name_in_zero_lists_the_parameters(wanted: str) -> None:
    with pytest.raises(ConfigError, match=f"zero names '{wanted}'") as caught:
        kind_of(does(nn.Tanh()), zero=(wanted,)).weights(SHAPE)
    assert caught.value.hint == "its parameters are: map.weight, map.bias"


def test_the_factorys_own_advice_reaches_the_user() -> None:
    def picky(shape: BlueprintShape) -> nn.Module:
        raise ConfigError(f"{shape.hidden} heads do not divide {shape.chunk}", "set seeds.hidden")

    with pytest.raises(ConfigError, match=r"^3 heads do not divide 4$"):
        kind_of(picky).weights(SHAPE)


def test_a_shape_that_goes_wrong_later_is_not_broadcast() -> None:
    kind = kind_of(does(lambda y: y if len(y) == 16 else y[..., :1]))
    bank = SeedBank(kind, SHAPE, 2)
    x, rows = torch.randn(5, 2, 4), torch.arange(2)
    with pytest.raises(ConfigError, match=r"returns \(5, 1\) for a chunk of \(5, 4\)"):
        bank.delta(x, x, rows)


def test_the_trial_leaves_the_random_state_and_the_callers_device_alone() -> None:
    before = torch.get_rng_state()
    with torch.device("meta"):
        kind_of(does(nn.Tanh())).weights(SHAPE)
        assert torch.zeros(1).is_meta
    assert torch.equal(torch.get_rng_state(), before)


def test_constants_are_shared_in_the_dtype_of_the_weights() -> None:
    class Shifted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.get_buffer("kept")

    def shifted(_: BlueprintShape) -> nn.Module:
        module = Shifted(4, 4)
        module.register_buffer("kept", torch.arange(4.0))
        module.register_buffer("mask", torch.tensor([True, False]))
        return module

    bank = SeedBank(kind_of(shifted), SHAPE, 2).to(torch.bfloat16)
    bank.reset(torch.arange(2), torch.zeros(2, dtype=torch.int16), "s")
    x = torch.zeros(3, 2, 4, dtype=torch.bfloat16)
    assert bank.delta(x, x, torch.arange(2)).dtype == torch.bfloat16


def test_a_norm_over_the_batch_works_without_running_statistics() -> None:
    kind = kind_of(does(nn.BatchNorm1d(4, track_running_stats=False)))
    bank = SeedBank(kind, SHAPE, 2)
    bank.reset(torch.arange(2), torch.zeros(2, dtype=torch.int16), "s")
    x = torch.randn(7, 2, 4)
    out = bank.delta(x, x, torch.arange(2)) + x
    assert torch.allclose(out.mean(0), torch.zeros(2, 4), atol=1e-5)


def test_a_lazy_layer_is_named_as_such_even_if_it_is_to_be_zero() -> None:
    with pytest.raises(ConfigError, match=r"'0.weight' .* has no size yet"):
        kind_of(lambda _: nn.Sequential(nn.LazyLinear(4)), zero=("0",)).weights(SHAPE)
