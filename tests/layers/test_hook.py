"""Seeds attached to modules of any model, which keep their class, names and place."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from esper_ray.errors import ConfigError
from esper_ray.layers import LayerSeeds, Output, attach_seeds, detach_seeds
from esper_ray.lifecycle import ExtendedLifecycle as S
from tests.builders import randomise, same_bits, walk

SEEDS = 4


class Pair(NamedTuple):
    main: Tensor
    rest: Tensor


class Host(nn.Module):
    """A Linear whose output comes in some container."""

    def __init__(self, container: str) -> None:
        super().__init__()
        self.linear, self.container = nn.Linear(6, 10), container

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        match self.container:
            case "tuple":
                return y.sum(), y
            case "named":
                return Pair(y, y.sum())
            case "list":
                return [y, None]
            case "dict":
                return OrderedDict(hidden=y, other=3)
        return y


def grown(seeds: LayerSeeds) -> LayerSeeds:
    """Every seed blended in at alpha 0.5."""
    walk(seeds, list(range(seeds.state.num_seeds)), S.STABILIZATION)
    randomise(seeds)
    seeds.state.alpha.fill_(0.5)
    seeds.refresh()
    return seeds


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


HOSTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | None, Output, int]] = {
    "linear": (lambda: nn.Linear(6, 10), (3, 6), Output(), 10),
    "sequential": (lambda: nn.Sequential(nn.Linear(6, 10), nn.ReLU()), (3, 6), Output(), 10),
    "in place": (lambda: nn.Sequential(nn.Linear(6, 10), nn.ReLU(True)), (3, 6), Output(), 10),
    "conv1d": (lambda: nn.Conv1d(3, 8, 3), (2, 3, 9), Output(feature_dim=1), 8),
    "conv2d": (lambda: nn.Conv2d(3, 8, 3, padding=1), (2, 3, 5, 4), Output(feature_dim=1), 8),
    "batch norm": (lambda: nn.BatchNorm2d(8), (2, 8, 5, 4), Output(feature_dim=1), 8),
    "layer norm": (lambda: nn.LayerNorm(10), (2, 3, 10), Output(), 10),
    "tuple": (lambda: Host("tuple"), (3, 6), Output(1), 10),
    "named": (lambda: Host("named"), (3, 6), Output(0), 10),
    "list": (lambda: Host("list"), (3, 6), Output(0), 10),
    "dict": (lambda: Host("dict"), (3, 6), Output("hidden"), 10),
    "embedding": (lambda: nn.Embedding(7, 10), None, Output(), 10),
}


def made(name: str) -> tuple[nn.Module, Tensor, Output, int]:
    build, shape, output, width = HOSTS[name]
    torch.manual_seed(1)
    return build(), torch.arange(7) if shape is None else numbers(*shape), output, width


def tensor_of(output: Any, part: int | str | None) -> Tensor:
    found = output if part is None else output[part]
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("name", HOSTS)
def test_a_host_keeps_class_names_output_and_gradients_while_its_seeds_sleep(name: str) -> None:
    host, x, output, width = made(name)
    bare = copy.deepcopy(host)
    attach_seeds(host, LayerSeeds(width, SEEDS), output)
    assert type(host) is type(bare)
    assert set(bare.state_dict()) <= set(host.state_dict())
    y, expected = host(x), bare(x)
    assert type(y) is type(expected)
    one, other = (tensor_of(each, output.part) for each in (y, expected))
    assert same_bits(one.detach().contiguous(), other.detach().contiguous())
    one.sin().sum().backward()  # type: ignore[no-untyped-call]
    other.sin().sum().backward()  # type: ignore[no-untyped-call]
    for key, parameter in bare.named_parameters():
        found = host.get_parameter(key)
        assert found.grad is not None
        assert parameter.grad is not None
        assert same_bits(found.grad, parameter.grad)


@pytest.mark.parametrize("name", HOSTS)
def test_blended_seeds_add_alpha_times_delta_along_the_feature_dimension(name: str) -> None:
    host, x, output, width = made(name)
    expected = tensor_of(copy.deepcopy(host)(x), output.part).movedim(output.feature_dim, -1)
    seeds = grown(attach_seeds(host, LayerSeeds(width, SEEDS, hidden=3), output))
    found = tensor_of(host(x), output.part).movedim(output.feature_dim, -1)
    flat = expected.reshape(-1, width)
    delta = seeds.bank.delta(seeds.chunks.pack(flat), None, torch.arange(SEEDS))
    by_hand = seeds.chunks.unpack(seeds.chunks.pack(flat) + 0.5 * delta).view(expected.shape)
    assert not torch.allclose(found, expected, atol=1e-3)
    assert torch.allclose(found, by_hand, atol=1e-5)


def test_seeds_on_a_convolution_may_read_its_input_where_positions_agree() -> None:
    host, x = nn.Conv2d(3, 8, 1), numbers(2, 3, 5, 4)
    bare = host(x).detach()
    grown(
        attach_seeds(
            host,
            LayerSeeds(8, SEEDS, inputs=3, blueprint_name="input_mlp", hidden=3),
            Output(feature_dim=1),
        )
    )
    assert not torch.allclose(host(x), bare, atol=1e-3)


def test_a_copied_model_runs_its_own_seeds() -> None:
    host = nn.Sequential(nn.Linear(6, 10), nn.ReLU())
    grown(attach_seeds(host[0], LayerSeeds(10, SEEDS, hidden=3)))
    twin, x = copy.deepcopy(host), numbers(3, 6)
    y = host(x)
    assert same_bits(twin(x).detach(), y.detach())
    randomise(twin[0].esper_seeds, seed=9)  # type: ignore[arg-type]
    assert same_bits(host(x).detach(), y.detach())
    assert not torch.equal(twin(x), y)


def test_a_pickled_model_comes_back_with_its_seeds() -> None:
    host, x, stored = nn.Sequential(nn.Linear(6, 10)), numbers(3, 6), io.BytesIO()
    grown(attach_seeds(host[0], LayerSeeds(10, SEEDS, hidden=3)))
    torch.save(host, stored)
    stored.seek(0)
    again = torch.load(stored, weights_only=False)
    assert same_bits(again(x).detach(), host(x).detach())


def test_detaching_leaves_the_host_as_it_was() -> None:
    host, x = nn.Linear(6, 10), numbers(3, 6)
    names, bare = set(host.state_dict()), host(x).detach()
    grown(attach_seeds(host, LayerSeeds(10, SEEDS)))
    detach_seeds(host)
    assert set(host.state_dict()) == names
    assert same_bits(host(x).detach(), bare)
    attach_seeds(host, LayerSeeds(10, SEEDS))


def test_a_host_has_seeds_once() -> None:
    host = nn.Linear(6, 10)
    attach_seeds(host, LayerSeeds(10, SEEDS))
    with pytest.raises(ConfigError, match="carries seeds already"):
        attach_seeds(host, LayerSeeds(10, SEEDS))


@pytest.mark.parametrize(
    ("output", "value", "said"),
    [
        (Output(), torch.zeros(()), "0-dimensional tensor of float32 has no feature dimension"),
        (Output(), torch.zeros(3), "1-dimensional tensor"),
        (Output(), torch.zeros(2, 3, dtype=torch.int64), "tensor of int64 has no feature"),
        (Output(), "text", "a str has no feature dimension"),
        (Output(2), (torch.zeros(2, 3),), "tuple, has no part 2"),
        (Output("h"), {"other": 1}, "dict, has no part 'h'"),
        (Output(0), None, "NoneType, has no part 0"),
    ],
)
def test_an_output_without_a_feature_dimension_is_named(
    output: Output, value: object, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        output.find(value)


def test_another_width_is_refused_and_another_batch_is_not() -> None:
    host = nn.Identity()
    grown(attach_seeds(host, LayerSeeds(10, SEEDS)))
    for samples in (2, 7, 1):
        assert host(torch.zeros(samples, 10)).shape == (samples, 10)
    with pytest.raises(ValueError, match="put out 11 features, but its seeds divide 10"):
        host(torch.zeros(2, 11))


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)])
def test_an_activation_that_writes_over_the_blended_output_changes_no_gradient(
    shape: tuple[int, ...],
) -> None:
    found = []
    for inplace, kernel in ((True, "auto"), (False, "auto"), (False, "torch")):
        torch.manual_seed(0)
        host = nn.Sequential(nn.Linear(6, 10), nn.ReLU(inplace), nn.Linear(10, 2))
        seeds = attach_seeds(host[0], LayerSeeds(10, SEEDS, hidden=3, kernel=kernel))
        grown(seeds)
        x = numbers(*shape).requires_grad_()
        host(x).sin().sum().backward()
        own = [seeds.bank.weights[name].grad for name in ("w_in", "b_in", "w_out", "b_out")]
        found.append([x.grad, *(p.grad for p in host[0].parameters(recurse=False)), *own])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert one is not None
            assert two is not None
            assert torch.allclose(one, two, atol=1e-6)
