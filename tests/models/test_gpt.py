"""The byte GPT: its size, what its positions see, its initial values, where it runs."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from esper_ray import data
from esper_ray.models import (
    LARGE,
    SMALL,
    ByteGPT,
    GPTSize,
    byte_gpt,
    same_parameters_mlp_width,
)
from esper_ray.models.gpt import Block

TINY = GPTSize(layers=3, width=32, heads=2, context=16)


def model(size: GPTSize = TINY, *, seed: int = 0, every_position: bool = True) -> ByteGPT:
    torch.manual_seed(seed)
    return ByteGPT(size, every_position)


def text(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))


def parameters(size: GPTSize) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in ByteGPT(size).parameters())


def language_loss(net: nn.Module, spans: Tensor) -> Tensor:
    logits = net(spans[:, :-1])
    return cross_entropy(logits.flatten(0, 1).float(), spans[:, 1:].flatten())


# ---- size ----------------------------------------------------------------------------------------


def test_the_presets_have_the_documented_sizes() -> None:
    assert parameters(SMALL) == 858_880
    assert parameters(LARGE) == 19_177_472


@pytest.mark.parametrize("size", [TINY, SMALL])
@pytest.mark.parametrize("extra", [0, 1, 1_000, 425_088])
def test_no_other_mlp_width_comes_nearer_to_the_same_parameters(size: GPTSize, extra: int) -> None:
    chosen = same_parameters_mlp_width(size, extra)
    wanted = parameters(size) + extra

    def distance(mlp_width: int) -> int:
        return abs(parameters(replace(size, mlp_width=mlp_width)) - wanted)

    assert distance(chosen) <= min(distance(chosen - 1), distance(chosen + 1))


def test_the_same_parameters_are_counted_from_a_width_already_chosen() -> None:
    assert same_parameters_mlp_width(replace(TINY, mlp_width=40), 0) == 40
    assert same_parameters_mlp_width(SMALL, 425_088, multiple=8) == 928
    assert same_parameters_mlp_width(TINY, -(10**6), multiple=8) == 8


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layers": 0}, "at least 1"),
        ({"mlp_width": 0}, "at least 1"),
        ({"heads": 5}, "multiple of heads 5"),
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        replace(TINY, **change)


def test_a_multiple_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple"):
        same_parameters_mlp_width(TINY, 0, multiple=0)


# ---- forward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 16])
def test_every_position_predicts_a_byte(length: int) -> None:
    assert model()(text(2, length)).shape == (2, length, 256)


def test_the_last_position_alone_predicts_what_it_predicts_among_all() -> None:
    x = text(4, 9)
    torch.testing.assert_close(model(every_position=False)(x), model()(x)[:, -1])


def test_more_bytes_than_the_context_are_refused() -> None:
    with pytest.raises(ValueError, match="17 bytes do not fit a context of 16"):
        model()(text(1, 17))


@pytest.mark.parametrize("place", [1, 8, 15])
def test_a_later_byte_never_changes_earlier_logits(place: int) -> None:
    net, x = model(), text(2, 16)
    other = x.clone()
    other[:, place:] = (other[:, place:] + 1) % 256
    before, after = net(x), net(other)
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.isclose(before[:, place:], after[:, place:]).all(-1).any()


def test_an_earlier_byte_reaches_every_later_position() -> None:
    net, x = model(), text(2, 16)
    other = x.clone()
    other[:, 0] = (other[:, 0] + 1) % 256
    assert not torch.isclose(net(x), net(other)).all(-1).any()


def test_an_mlp_reads_the_normalised_stream_and_gives_what_is_added_to_it() -> None:
    block = model().blocks[0]
    assert isinstance(block, Block)
    x = torch.randn(2, 5, 32)
    y = x + block.attention(block.attention_norm(x))
    assert torch.equal(block(x), y + block.mlp(block.mlp_norm(y)))


# ---- initial values ------------------------------------------------------------------------------


def test_initial_values_follow_torchs_generator() -> None:
    one, same, other = model(seed=1), model(seed=1), model(seed=2)
    for (name, p), q, r in zip(
        one.named_parameters(), same.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(p, q)
        assert p.ndim == 1 or not torch.equal(p, r), name


def test_two_models_built_one_after_the_other_differ() -> None:
    one, other = model(), ByteGPT(TINY)
    assert not torch.equal(one.embedding.positions, other.embedding.positions)


def test_no_two_tensors_share_their_initial_values() -> None:
    starts = [tuple(p.flatten()[:8].tolist()) for p in model().parameters() if p.ndim == 2]
    assert len(set(starts)) == len(starts)


def test_weights_are_small_and_residual_projections_smaller() -> None:
    net = model(SMALL)
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif "norm" in name:
            assert bool((p == 1).all())
        else:
            residual = name.endswith(("out.weight", "down.weight"))
            assert p.std().item() == pytest.approx(0.02 / 8**0.5 if residual else 0.02, rel=0.02)


@pytest.mark.parametrize("mlp_width", [129, 200])
def test_a_wider_mlp_shares_all_values_but_its_further_units(mlp_width: int) -> None:
    usual, wide = model(), model(replace(TINY, mlp_width=mlp_width))
    for p, q in zip(usual.parameters(), wide.parameters(), strict=True):
        assert torch.equal(p, q[tuple(slice(n) for n in p.shape)])


# ---- where it runs -------------------------------------------------------------------------------


def test_under_autocast_logits_are_bfloat16_and_gradients_float32() -> None:
    net = model()
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(text(2, 16))
        loss = language_loss(net, text(2, 17))
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.dtype == torch.bfloat16
    assert {p.grad.dtype for p in net.parameters() if p.grad is not None} == {torch.float32}
    assert all(p.grad is not None for p in net.parameters())
    assert (logits.float() - net(text(2, 16))).abs().max() < 0.05


def test_shapes_are_known_without_memory_and_the_tied_head_survives_being_moved() -> None:
    with torch.device("meta"):
        net = ByteGPT(TINY)
        assert net(torch.empty(2, 16, dtype=torch.int64)).shape == (2, 16, 256)
    source = model()
    net.to_empty(device="cpu").load_state_dict(source.state_dict())
    twin = copy.deepcopy(net)
    loss = language_loss(twin, text(2, 17))
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.equal(net(text(2, 16)), source(text(2, 16)))
    assert len(list(twin.parameters())) == len(list(source.parameters()))


def test_one_graph_serves_every_batch_of_a_shape() -> None:
    net = model()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    first = compiled(text(2, 16))
    with torch.compiler.set_stance("fail_on_recompile"):
        second = compiled(text(2, 16, seed=2))
    torch.testing.assert_close(first, net(text(2, 16)))
    torch.testing.assert_close(second, net(text(2, 16, seed=2)))


@pytest.mark.gpu
def test_a_training_step_is_captured_as_a_cuda_graph() -> None:
    net, span = model().cuda(), text(4, 17).cuda()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2, capturable=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = language_loss(net, span)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        first = step().item()
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(20):
        graph.replay()
    assert captured.item() < first - 1


# ---- training ------------------------------------------------------------------------------------


def test_a_few_steps_lower_the_loss_on_text() -> None:
    net, split = model(), data.load("stdlib_text", window=16, cap_bytes=60_000).train
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        x, y = split.draw(16, "test", step)
        loss = language_loss(net, torch.cat([x, y[:, None]], 1))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(5.55, abs=0.15)  # log 256
    assert sum(losses[-5:]) / 5 < losses[0] - 1.5


# ---- stages --------------------------------------------------------------------------------------


def staged(stages: int, *, layers: int = 3, every_position: bool = False) -> list[nn.Module]:
    made = byte_gpt(layers, 32, 2, 16, every_position=every_position, stages=stages)
    return [stage.build() for stage in made]


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("stages", [1, 2])
def test_stages_predict_the_byte_after_the_window(stages: int, layers: int) -> None:
    x, _ = data.load("stdlib_text", window=16, cap_bytes=60_000).train.take(torch.arange(3))
    modules = staged(stages, layers=layers)
    blocks = [m for part in modules for m in part.get_submodule("blocks").children()]
    assert len(blocks) == layers
    assert nn.Sequential(*modules)(x).shape == (3, 256)


@pytest.mark.parametrize("stages", [1, 2])
def test_stages_predict_every_position_where_asked(stages: int) -> None:
    net = nn.Sequential(*staged(stages, every_position=True))
    assert net(text(3, 5)).shape == (3, 5, 256)


def test_two_stages_share_no_tensor_and_have_a_head_more() -> None:
    reader, predictor = (set(stage.build().parameters()) for stage in byte_gpt())
    assert not reader & predictor
    assert sum(p.numel() for p in reader | predictor) == 858_880 + 256 * 128


def test_one_stage_is_the_tied_model() -> None:
    (stage,) = byte_gpt(stages=1)
    assert sum(p.numel() for p in stage.build().parameters()) == 858_880


def test_three_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="1 or 2"):
        byte_gpt(stages=3)
