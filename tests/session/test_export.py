"""A grown model that runs where esper_ray cannot be imported."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import esper_ray
from esper_ray.errors import ConfigError
from esper_ray.layers import LayerSeeds
from esper_ray.lifecycle import ExtendedLifecycle as S
from tests.builders import randomise, walk
from tests.pages import python
from tests.session.models import X, attached, mlp, quick, train

BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("esper_ray", "ray"):
            raise ImportError(name)

sys.meta_path.insert(0, Block())
import safetensors.torch, torch
from torch import nn
torch.set_num_threads(1)
"""


def grown(model: nn.Module, alpha: float = 1.0, **changes: object) -> nn.Module:
    """The model with seeds of random weights, all blended by `alpha`."""
    esper_ray.attach(model, quick(**changes))
    for module in list(model.modules()):
        if isinstance(module, LayerSeeds):
            walk(module, list(range(module.state.num_seeds)), S.STABILIZATION)
            randomise(module)
            module.state.alpha.fill_(alpha)
            module.refresh()
    return model.eval()


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max())


def conv(kernel: int, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 10, kernel, padding=kernel // 2, bias=bias), nn.ReLU())


@pytest.mark.parametrize("blueprint", ["low_rank", "affine"])
@pytest.mark.parametrize("alpha", [1.0, 0.25])
@pytest.mark.parametrize(
    ("build", "x"),
    [
        (mlp, X),
        (lambda: nn.Sequential(nn.Linear(16, 9, bias=False), nn.Tanh()), X),
        (lambda: conv(1), torch.randn(2, 3, 5, 6)),
        (lambda: conv(3, bias=False), torch.randn(2, 3, 5, 6)),
    ],
)
def test_linear_seeds_become_part_of_the_weights(
    blueprint: str, alpha: float, build: Callable[[], nn.Module], x: Tensor
) -> None:
    model = grown(build(), alpha, blueprint=blueprint)
    expected, before = model(x), copy.deepcopy(model.state_dict())
    exported = esper_ray.export(model)
    assert exported.not_folded == ()
    assert close(exported.model(x), expected)
    assert not close(build()(x), expected)
    assert [n for n in exported.model.state_dict() if "seeds" in n] == []
    assert all(torch.equal(before[n], value) for n, value in model.state_dict().items())


def test_a_folded_model_loads_without_esper_ray(tmp_path: Path) -> None:
    model = grown(mlp(), blueprint="low_rank")
    exported = esper_ray.export(model)
    exported.save(tmp_path / "m.safetensors")
    torch.save(exported.model, tmp_path / "whole.pt")
    safetensors.torch.save_file({"x": X, "y": model(X).detach()}, tmp_path / "xy")
    code = """
xy = safetensors.torch.load_file("xy")
model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
model.load_state_dict(safetensors.torch.load_file("m.safetensors"))
whole = torch.load("whole.pt", weights_only=False)
print(*(float((m(xy["x"]) - xy["y"]).abs().max()) < 1e-4 for m in (model, whole)))
"""
    assert python("-c", BLOCKED + code, folder=tmp_path) == "True True\n"


def test_other_seeds_run_as_a_program_without_esper_ray(tmp_path: Path) -> None:
    model, optimizer, session = attached()
    train(model, optimizer, session, range(60))
    model.eval()
    samples = torch.export.Dim("samples", min=2, max=1000)
    exported = esper_ray.export(model, sample=X[:5], dynamic_shapes=({0: samples},))
    assert [(n.layer, "'input_mlp' is not" in n.reason) for n in exported.not_folded] == [
        ("0", True)
    ]
    assert close(exported.model(X), model(X))
    exported.save(tmp_path / "m.pt2")
    with pytest.raises(ConfigError, match="no part of its weights"):
        exported.save(tmp_path / "m.safetensors")
    safetensors.torch.save_file({"x": X, "y": model(X).detach()}, tmp_path / "xy")
    code = """
xy = safetensors.torch.load_file("xy")
model = torch.export.load("m.pt2").module()
print(float((model(xy["x"]) - xy["y"]).abs().max()) < 1e-4, "esper_ray" in sys.modules)
"""
    assert python("-c", BLOCKED + code, folder=tmp_path) == "True False\n"


@pytest.mark.parametrize("name", ["bottleneck", "input_mlp", "input_chunk_mlp", "low_rank"])
def test_frozen_seeds_compute_what_seeds_do(name: str) -> None:
    model = grown(
        nn.Sequential(nn.Linear(16, 10), nn.LayerNorm(10)), 0.5, blueprint=name, targets=["0", "1"]
    )
    exported = esper_ray.export(model, sample=X)
    assert exported.program is not None
    assert close(exported.model(X), model(X))
    assert close(exported.program.module()(X), model(X))


def test_seeds_that_are_not_blended_are_left_out() -> None:
    model, optimizer, session = attached()
    train(model, optimizer, session, range(12))
    exported = esper_ray.export(model)
    assert torch.equal(exported.model(X), model(X))
    assert list(exported.model.state_dict()) == list(mlp().state_dict())
    assert exported.not_folded == ()
    assert session.states().counts == {"TRAINING": 4}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


def _hooked() -> nn.Module:
    model = mlp()
    model[0].register_forward_hook(_same)
    return model


def _same(*_: object) -> None:
    return None


@pytest.mark.parametrize(
    ("build", "targets", "reason"),
    [
        (Tied, ["first"], "shared"),
        (_hooked, ["0"], "another forward hook"),
        (lambda: nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8)), ["1"], "LayerNorm"),
        (
            lambda: nn.Sequential(nn.Unflatten(1, (4, 4)), nn.Conv1d(4, 8, 1, groups=2)),
            ["1"],
            "Conv1d",
        ),
    ],
)
def test_what_cannot_be_folded_says_why(
    build: Callable[[], nn.Module], targets: list[str], reason: str
) -> None:
    model = grown(build(), blueprint="low_rank", targets=targets)
    (left,) = esper_ray.export(model).not_folded
    assert left.layer == targets[0]
    assert reason in left.reason


def test_what_was_not_made_cannot_be_saved(tmp_path: Path) -> None:
    exported = esper_ray.export(mlp())
    with pytest.raises(ConfigError, match="no program was traced"):
        exported.save(tmp_path / "m.pt2")
    with pytest.raises(ConfigError, match="neither in"):
        exported.save(tmp_path / "m.onnx")
