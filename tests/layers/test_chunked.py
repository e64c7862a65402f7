"""The layer: bit-equal to its host while hidden, x + alpha * delta while not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from esper_ray.blueprints import AffineBlueprint, blueprint_names
from esper_ray.errors import ConfigError
from esper_ray.grafting import GraftingSettings
from esper_ray.layers import ChunkedKasminaLayer
from esper_ray.lifecycle import ExtendedLifecycle as S
from tests.builders import PATHS, move, randomise, same_bits, signals, transitions, walk

WIDTHS = [12, 10]  # even and ragged among four seeds
SEEDS = 4
EVERYONE = list(range(SEEDS))
HIDDEN = [S.DORMANT, S.GERMINATED, S.TRAINING, S.CULLED, S.CANCELLED, S.ROLLED_BACK]


def host(width: int) -> nn.Module:
    torch.manual_seed(width)
    return nn.Linear(6, width)


def grown(base: nn.Module, width: int, **given: Any) -> ChunkedKasminaLayer:
    """A layer of four seeds with three hidden units each."""
    return ChunkedKasminaLayer(base, SEEDS, width=width, hidden=3, **given)


def blended(width: int, alphas: list[float], blueprint_name: str = "bottleneck") -> nn.Module:
    """An identity host in float64 whose seeds have weights and these alphas in GRAFTING."""
    layer = grown(nn.Identity(), width, inputs=width, blueprint_name=blueprint_name).double()
    walk(layer, EVERYONE, S.GRAFTING)
    randomise(layer)
    return set_alpha(layer, alphas)


def set_alpha(layer: ChunkedKasminaLayer, alphas: list[float]) -> ChunkedKasminaLayer:
    layer.state.alpha.copy_(torch.tensor(alphas))
    layer.refresh()
    return layer


def numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def by_hand(layer: ChunkedKasminaLayer, h: Tensor, alpha: Tensor) -> Tensor:
    """Seed by seed, each on its own zero-padded chunk; alpha is (seeds,)."""
    pieces = []
    for seed, chunk in enumerate(layer.chunks.split(h)):
        padded = nn.functional.pad(chunk, (0, layer.chunks.chunk_width - chunk.shape[-1]))
        own = {name: w[seed : seed + 1] for name, w in layer.bank.weights.items()}
        delta = layer.bank.kind.delta(
            own, padded.reshape(-1, 1, padded.shape[-1]), h.reshape(-1, h.shape[-1])
        )
        delta = delta.reshape(padded.shape)
        pieces.append(chunk + alpha[seed] * delta[..., : chunk.shape[-1]])
    return torch.cat(pieces, dim=-1)


# ---- while hidden ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", blueprint_names())
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("state", HIDDEN)
def test_lesson_13_a_hidden_seed_changes_no_bit_of_output_or_gradients(
    state: S, width: int, sampled: bool, name: str
) -> None:
    bare = host(width)
    layer = grown(copy.deepcopy(bare), width, blueprint_name=name)
    walk(layer, EVERYONE, state)
    randomise(layer)
    if not sampled:
        layer(numbers(5, 6).float())  # the first forward was sampled, the next seven are not

    def run(module: nn.Module) -> list[Tensor]:
        x = numbers(5, 6).float().requires_grad_()
        y = module(x)
        y.sin().sum().backward()
        assert x.grad is not None
        grads = [p.grad for name, p in module.named_parameters() if "bank" not in name]
        return [y.detach(), x.grad, *(g for g in grads if g is not None)]

    with_seeds, without = run(layer), run(bare)
    assert len(with_seeds) == len(without) == 4
    assert all(same_bits(a, b) for a, b in zip(with_seeds, without, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
def test_lesson_13_a_newborn_residual_seed_at_alpha_one_changes_nothing(
    dtype: torch.dtype, width: int
) -> None:
    layer = grown(host(width), width).to(dtype)
    walk(layer, EVERYONE, S.STABILIZATION)
    x = numbers(5, 6).to(dtype)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("width", WIDTHS)
def test_a_seed_at_alpha_zero_is_skipped_even_if_it_is_not_a_number(width: int) -> None:
    layer = set_alpha(grown(host(width), width), [0.0, 0.5, 0.0, 1.0])
    randomise(layer)
    x = numbers(5, 6).float().requires_grad_()
    expected = layer(x).detach()
    with torch.no_grad():
        for weight in layer.bank.weights.values():
            weight[[0, 2]] = torch.nan
    y = layer(x)
    y.sum().backward()
    assert same_bits(y.detach(), expected)
    assert x.grad is not None
    assert x.grad.isfinite().all()
    with torch.no_grad():
        override = layer(x, alpha=torch.tensor([[0.0, 0.5, 0.0, 1.0]]))
    assert same_bits(override, expected)


# ---- while blended ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", blueprint_names())
@pytest.mark.parametrize("samples", [(3,), (2, 5), (0,)], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_output_is_x_plus_alpha_times_delta(
    width: int, samples: tuple[int, ...], name: str
) -> None:
    layer = blended(width, [0.25, 0.0, 1.0, 0.7], name)
    assert isinstance(layer, ChunkedKasminaLayer)
    x = numbers(*samples, width)
    expected = by_hand(layer, x, layer.state.alpha)
    assert torch.allclose(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", blueprint_names())
@pytest.mark.parametrize("width", WIDTHS)
def test_lesson_04_gradients_of_inputs_and_weights_are_right_at_partial_alpha(
    width: int, name: str
) -> None:
    layer = blended(width, [0.25, 0.0, 1.0, 0.7], name)
    names = [n for n, _ in layer.named_parameters()]

    def output(x: Tensor, *weights: Tensor) -> Tensor:
        out: Tensor = functional_call(layer, dict(zip(names, weights, strict=True)), (x,))
        return out

    arguments = [numbers(2, width), *(p.detach().clone() for p in layer.parameters())]
    assert len(arguments) == 1 + len(names)
    assert torch.autograd.gradcheck(output, [a.requires_grad_() for a in arguments])


@pytest.mark.parametrize("width", WIDTHS)
def test_lesson_27_a_seed_reads_and_writes_its_own_chunk_only(width: int) -> None:
    layer = blended(width, [0.25, 0.5, 1.0, 0.7])
    assert isinstance(layer, ChunkedKasminaLayer)
    x = numbers(width).requires_grad_()
    y = layer(x)
    jacobian = torch.stack([torch.autograd.grad(one, x, retain_graph=True)[0] for one in y])
    own = torch.zeros(width, width, dtype=torch.bool)
    for seed in EVERYONE:
        first, end = layer.chunks.bounds(seed)
        own[first:end, first:end] = True
    assert not jacobian[~own].any()
    off_diagonal = own & ~torch.eye(width, dtype=torch.bool)
    assert jacobian[off_diagonal].any()


@pytest.mark.parametrize("width", WIDTHS)
def test_lesson_27_the_weights_of_a_seed_get_gradient_from_its_own_chunk_only(width: int) -> None:
    layer = blended(width, [0.25, 0.5, 1.0, 0.7])
    assert isinstance(layer, ChunkedKasminaLayer)
    first, end = layer.chunks.bounds(2)
    layer(numbers(3, width))[..., first:end].sum().backward()
    for weight in layer.bank.weights.values():
        assert weight.grad is not None
        assert weight.grad[2].any()
        assert not weight.grad[[0, 1, 3]].any()


@pytest.mark.parametrize("name", ["bottleneck", "input_mlp"])
@pytest.mark.parametrize("width", WIDTHS)
def test_lesson_27_a_broken_seed_is_taken_out_and_its_faults_are_counted(
    width: int, name: str
) -> None:
    layer = blended(width, [1.0, 1.0, 1.0, 1.0], name)
    assert isinstance(layer, ChunkedKasminaLayer)
    x = numbers(3, width).requires_grad_()
    before = layer(x)
    with torch.no_grad():
        layer.bank.weights["w_out"][1] = torch.nan
    after = layer(x)
    first, end = layer.chunks.bounds(1)
    assert same_bits(after[..., first:end], x[..., first:end])  # the host is the identity
    kept = [i for i in range(width) if not first <= i < end]
    assert same_bits(after[..., kept], before[..., kept])
    after.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    for weight in layer.bank.weights.values():
        assert weight.grad is not None
        assert weight.grad[[0, 2, 3]].isfinite().all()
    assert layer.take_faults().tolist() == [0, 1, 0, 0]
    assert layer.take_faults().tolist() == [0, 0, 0, 0]


class Failing(AffineBlueprint):
    """Raises, or puts out what would be broadcast."""

    def __init__(self, how: str) -> None:
        self.how = how

    def forward(self, weights: Mapping[str, Tensor], x: Tensor, u: Tensor) -> Tensor:
        if self.how == "raises":
            raise KeyError("no such table")
        out = super().forward(weights, x, u)
        return out[..., :1] if self.how == "narrow" else out[:1]


@pytest.mark.parametrize("how", ["raises", "narrow", "one sample"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_failing_blueprint_leaves_the_host_right_and_is_counted(
    width: int, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    layer = blended(width, [1.0, 0.0, 0.5, 0.0], "affine")
    assert isinstance(layer, ChunkedKasminaLayer)
    layer.bank.kind = Failing(how)
    x = numbers(3, width).requires_grad_()
    y = layer(x)
    assert torch.equal(y, x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))
    assert layer.take_faults().tolist() == [1, 0, 1, 0]
    assert "its blueprint failed" in caplog.text


# ---- alpha as an argument --------------------------------------------------------------------


@pytest.mark.parametrize("samples", [(4,), (4, 3)], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_lesson_28_an_alpha_argument_equals_setting_alpha_and_changes_nothing(
    width: int, samples: tuple[int, ...]
) -> None:
    layer, asked = blended(width, [0.0, 0.0, 1.0, 0.5]), [1.0, 0.0, 0.25, 0.5]
    assert isinstance(layer, ChunkedKasminaLayer)
    x, before = numbers(*samples, width), copy.deepcopy(layer.state_dict())
    for rows in (1, samples[0]):
        given = layer(x, alpha=torch.tensor([asked] * rows, dtype=torch.float64))
        assert all(same_bits(before[name], value) for name, value in layer.state_dict().items())
        twin = set_alpha(copy.deepcopy(layer), asked)
        assert same_bits(given, twin(x))
    assert same_bits(layer(x), set_alpha(copy.deepcopy(layer), [0.0, 0.0, 1.0, 0.5])(x))


@pytest.mark.parametrize("width", WIDTHS)
def test_each_sample_may_have_alphas_of_its_own(width: int) -> None:
    layer, x = blended(width, [1.0] * 4), numbers(4, width)
    alphas = torch.eye(4, dtype=torch.float64)
    together = layer(x, alpha=alphas)
    for row in range(4):
        alone = layer(x[row : row + 1], alpha=alphas[row : row + 1])
        assert torch.allclose(together[row : row + 1], alone, rtol=1e-12, atol=1e-12)


def test_a_broken_seed_is_taken_out_of_every_sample() -> None:
    layer, x = blended(10, [1.0] * 4), numbers(2, 10)
    assert isinstance(layer, ChunkedKasminaLayer)
    alphas = torch.tensor([[0.0, 0.5, 0.0, 1.0], [1.0, 0.5, 0.0, 1.0]], dtype=torch.float64)
    expected = layer(x, alpha=alphas)
    with torch.no_grad():
        for weight in layer.bank.weights.values():
            weight[0] = torch.nan
    found = layer(x, alpha=alphas)
    assert same_bits(found[0], expected[0])
    first, end = layer.chunks.bounds(0)
    assert same_bits(found[1, first:end], x[1, first:end])


def test_alphas_of_zero_leave_the_host_output() -> None:
    layer, x = blended(10, [1.0] * 4), numbers(4, 10)
    assert same_bits(layer(x, alpha=torch.zeros(1, 4, dtype=torch.float64)), x)


# ---- transitions -----------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
def test_lesson_02_output_is_continuous_from_grafting_to_fossilized(width: int) -> None:
    layer = blended(width, [1.0] * 4)
    assert isinstance(layer, ChunkedKasminaLayer)
    x = numbers(3, width)
    expected = layer(x)
    assert not torch.equal(expected, x)
    for source, target in pairwise(PATHS[S.FOSSILIZED][3:]):
        move(layer, EVERYONE, source, target)
        assert same_bits(layer(x), expected), target.name


def test_entering_grafting_changes_nothing_yet() -> None:
    layer = grown(host(10), 10)
    walk(layer, EVERYONE, S.TRAINING)
    randomise(layer)
    x = numbers(3, 6).float()
    before = layer(x)
    move(layer, EVERYONE, S.TRAINING, S.GRAFTING)
    assert same_bits(layer(x), before)


@pytest.mark.parametrize("left", [S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING])
def test_lesson_22_rolling_back_restores_the_row_and_the_host_output(left: S) -> None:
    layer = grown(host(10), 10)
    walk(layer, EVERYONE, S.TRAINING)
    randomise(layer, seed=1)
    layer.bank.step_count += 5
    layer.bank.moments("w_in")[0].fill_(0.5)
    kept = {name: value.clone() for name, value in layer.bank.tensors().items()}
    for source, target in pairwise(PATHS[left][2:]):
        move(layer, [0, 1], source, target)
    randomise(layer, seed=2)
    layer.bank.step_count += 7
    changed = {name: value.clone() for name, value in layer.bank.tensors().items()}
    move(layer, [1], left, S.ROLLED_BACK)
    for name, value in layer.bank.tensors().items():
        assert same_bits(value[1], kept[name][1])
        assert same_bits(value[[0, 2, 3]], changed[name][[0, 2, 3]])
    assert layer.state.alpha[1] == 0
    assert layer.state.state_tensor[1, layer.state.PARENT_STATE] == left


def test_a_refused_row_keeps_its_weights() -> None:
    layer = grown(host(10), 10)
    randomise(layer)
    before = {name: value.clone() for name, value in layer.bank.tensors().items()}
    applied, _ = layer.apply_transitions(transitions([0, 1], S.TRAINING, S.GRAFTING))
    assert not applied.any()
    assert not layer.bank.parked.any()
    assert all(same_bits(before[n], v) for n, v in layer.bank.tensors().items())


def test_germinating_gives_each_seed_weights_of_its_own() -> None:
    layer = grown(host(10), 10)
    walk(layer, [0, 2], S.GERMINATED)
    w_in = layer.bank.weights["w_in"]
    assert w_in[0].any()
    assert w_in[2].any()
    assert not torch.equal(w_in[0], w_in[2])
    assert not w_in[[1, 3]].any()


# ---- epochs ----------------------------------------------------------------------------------


def test_alpha_follows_the_ramp_in_grafting() -> None:
    layer = grown(host(10), 10)
    walk(layer, [1], S.GRAFTING)
    seen = []
    for _ in range(5):
        layer.advance_epoch(signals([1]), GraftingSettings(ramp_epochs=4), epoch=0)
        seen.append(float(layer.state.alpha[1]))
        assert layer.rows("blended").ids.tolist() == [1]
    assert seen == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_lesson_18_forward_advances_nothing_and_eval_mode_cannot_advance() -> None:
    layer = grown(host(10), 10)
    walk(layer, [1], S.TRAINING)
    layer(numbers(3, 6).float())
    assert layer.state.view().epochs_in_state.tolist() == [0] * SEEDS
    layer.eval()
    with pytest.raises(RuntimeError, match="'layer' is in eval mode"):
        layer.advance_epoch(signals([]), GraftingSettings(), epoch=0)


# ---- listening -------------------------------------------------------------------------------


def test_what_was_heard_are_the_chunks_and_the_gradients_there() -> None:
    layer = grown(host(10), 10)
    walk(layer, [1, 2], S.TRAINING)
    x = numbers(6, 6).float()
    for part in x.chunk(3):
        (layer(part) ** 2).sum().backward()
    heard = layer.hearing.take()
    assert heard is not None
    h = layer.base_layer(x).detach()
    assert not heard.x.requires_grad
    assert heard.u.shape == (6, 0)  # a bottleneck reads nothing beside
    assert same_bits(heard.x, layer.chunks.pack(h)[:, 1:3])
    assert torch.allclose(heard.g, 2 * heard.x)
    assert float(heard.h_square) == pytest.approx(float(h.square().sum()), rel=1e-5)
    assert float(heard.g_square) == pytest.approx(float(4 * h.square().sum()), rel=1e-5)
    assert heard.values == h.numel()
    assert layer.hearing.take() is None


@pytest.mark.parametrize("name", ["input_mlp", "input_chunk_mlp"])
def test_what_the_host_read_is_kept_for_blueprints_that_read_it(name: str) -> None:
    layer = grown(host(10), 10, blueprint_name=name)
    walk(layer, [1], S.TRAINING)
    x = numbers(6, 6).float()
    for part in x.chunk(3):
        layer(part).sum().backward()
    heard = layer.hearing.take()
    assert heard is not None
    assert same_bits(heard.u, x)


@pytest.mark.parametrize("name", ["input_mlp", "input_chunk_mlp"])
def test_an_input_fed_seed_writes_its_own_chunk_and_teaches_the_host_before_it(name: str) -> None:
    layer = grown(host(10), 10, blueprint_name=name)
    layer.requires_grad_(True)
    walk(layer, EVERYONE, S.STABILIZATION)
    randomise(layer)
    set_alpha(layer, [0.0, 1.0, 0.0, 0.0])
    x = numbers(5, 6).float().requires_grad_()
    first, end = layer.chunks.bounds(1)
    y, bare = layer(x), layer.base_layer(x)
    changed = (y != bare).any(0).tolist()
    assert changed == [first <= column < end for column in range(10)]
    (gradient,) = torch.autograd.grad((y - bare).sum(), x)
    assert gradient.any()


def test_a_frozen_host_is_heard_too() -> None:
    layer = grown(host(10), 10)
    walk(layer, [0, 3], S.TRAINING)
    layer.base_layer.requires_grad_(False)
    layer(numbers(2, 6).float()).sum().backward()
    heard = layer.hearing.take()
    assert heard is not None
    assert torch.equal(heard.g, layer.chunks.valid[[0, 3]].float().expand(2, -1, -1))


@pytest.mark.parametrize("why", ["no_grad", "eval"])
def test_nothing_is_heard_without_training(why: str) -> None:
    layer = grown(host(10), 10)
    walk(layer, EVERYONE, S.TRAINING)
    layer.train(why != "eval")
    with torch.set_grad_enabled(why != "no_grad"):
        y = layer(numbers(2, 6).float())
    if why == "eval":
        y.sum().backward()
    assert layer.hearing.take() is None


@pytest.mark.parametrize("alphas", [[0.0] * 4, [0.5, 0.0, 1.0, 0.0]])
def test_lesson_05_forward_never_waits_for_the_device(
    alphas: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = grown(nn.Identity(), 10, inputs=10, kernel="torch").double()
    walk(layer, EVERYONE, S.GRAFTING)
    set_alpha(layer, alphas)  # not the kernel for CPUs, which may look at what is there
    x = numbers(3, 10)
    layer(x)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("forward read a tensor on the host")

    for name in ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(Tensor, name, refuse)
    assert layer(x).shape == (3, 10)


# ---- as a module -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 10), nn.ReLU()), (3, 6)),
        (lambda: nn.LayerNorm(10), (3, 10)),
        (lambda: nn.Embedding(7, 10), None),
        (lambda: nn.Identity(), (2, 3, 10)),
    ],
    ids=["sequential", "layer_norm", "embedding", "identity"],
)
def test_lesson_08_any_module_with_a_last_dimension_may_carry_seeds(
    make: Callable[[], nn.Module], shape: tuple[int, ...] | None
) -> None:
    layer = set_alpha(grown(make(), 10), [1.0, 0.5, 0.0, 1.0])
    randomise(layer)
    x = torch.arange(7) if shape is None else numbers(*shape).float()
    h = layer.base_layer(x)
    assert torch.allclose(layer(x), by_hand(layer, h, layer.state.alpha), atol=1e-6)


def test_lesson_08_memory_layout_does_not_matter() -> None:
    layer, x = blended(10, [1.0, 0.5, 0.0, 1.0]), numbers(3, 4, 10)
    strided = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous()
    assert torch.allclose(layer(strided), layer(x), rtol=1e-12)


def test_lesson_03_seed_weights_are_parameters_of_their_own() -> None:
    layer = grown(host(10), 10)
    seeds = {id(p) for p in layer.bank.parameters()}
    assert {id(p) for p in layer.host_parameters()} | seeds == {id(p) for p in layer.parameters()}
    assert not {id(p) for p in layer.host_parameters()} & seeds


def test_lesson_10_a_width_that_is_not_the_outputs_is_refused_in_forward() -> None:
    layer = set_alpha(grown(nn.Identity(), 10), [1.0] * 4)
    with pytest.raises(ValueError, match=r"11 features.*10"):
        layer(torch.zeros(2, 11))


def test_a_layer_of_unknown_width_says_what_to_pass() -> None:
    with pytest.raises(ConfigError, match="width of layer 'first' is unknown") as caught:
        ChunkedKasminaLayer(nn.ReLU(), 4, "first")
    assert "pass width" in caught.value.hint


def test_a_linear_layer_knows_its_width() -> None:
    assert ChunkedKasminaLayer(nn.Linear(3, 7), 2).chunks.width == 7


def test_lesson_01_more_seeds_than_features_are_refused() -> None:
    with pytest.raises(ConfigError, match="7 features among 1000 seeds"):
        ChunkedKasminaLayer(nn.Linear(3, 7))
