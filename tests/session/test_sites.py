"""Which modules carry seeds, how wide they are, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper_ray
from esper_ray.errors import ConfigError, NoMatch
from esper_ray.layers import LayerSeeds, Output
from esper_ray.layers.told import read
from esper_ray.lifecycle import ExtendedLifecycle
from esper_ray.session import SeedConfig
from tests.builders import randomise, walk
from tests.session.models import X, mlp, quick


def layers(model: nn.Module, **changes: Any) -> list[str]:
    return [row.layer for row in esper_ray.plan(model, quick(**changes)).layers]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"targets": ["0"]}, ["0"]),
        ({"targets": ["[02]"]}, ["0", "2"]),
        ({"targets": [nn.Linear]}, ["0", "2"]),
        ({"targets": [lambda name, module: name == "2" and isinstance(module, nn.Linear)]}, ["2"]),
        ({"targets": ["2", nn.Linear], "exclude": ["0"]}, ["2"]),
        ({"targets": [nn.Linear], "exclude": [lambda name, _: name > "1"]}, ["0"]),
    ],
)
def test_modules_are_named_by_pattern_class_or_function(
    changes: dict[str, Any], expected: list[str]
) -> None:
    assert layers(mlp(), **changes) == expected


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"targets": ["0", "dense*"]}, "targets entry 'dense\\*' matches no module", "nearest: "),
        ({"targets": [nn.Conv2d]}, "targets entry 'Conv2d' matches no module", "Linear"),
        ({"targets": ["0"], "exclude": ["9"]}, "exclude entry '9' matches no", "nearest: "),
        ({"targets": [lambda *_: False]}, "<lambda> accepts no module", "name and module"),
        ({"targets": ["0"], "exclude": [nn.Linear]}, "leaves no module", "fewer"),
    ],
)
def test_an_entry_that_matches_nothing_is_an_error(
    changes: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(NoMatch, match=message) as caught:
        layers(mlp(), **changes)
    assert hint in caught.value.hint


def test_one_module_inside_another_is_refused() -> None:
    nested = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=r"'0' and '0\.0' inside it"):
        layers(nested, targets=["0*"])
    with pytest.raises(ConfigError, match="the model itself and modules inside"):
        layers(nested, targets=["", "1"])


def test_the_model_itself_can_carry_seeds() -> None:
    model = nn.Linear(16, 8)
    y = model(X)
    session = esper_ray.attach(model, quick(targets=[nn.Linear]))
    assert torch.equal(model(X), y)
    assert session.states()[""].counts == {"DORMANT": 4}
    assert str(session.states()) == "(model): 4 DORMANT"
    assert session.request("germinate", [0])[0].name == "NONE"
    session.save("memory://root")
    again = nn.Linear(16, 8)
    esper_ray.restore(again, "memory://root")
    assert torch.equal(again(X), y)


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (nn.Linear(3, 5), (5, 3, -1)),
        (nn.Conv1d(3, 5, 1), (5, 3, 1)),
        (nn.Conv2d(3, 5, 3), (5, 0, 1)),
        (nn.Conv2d(3, 5, 1, stride=2), (5, 0, 1)),
        (nn.Conv2d(3, 5, 1, padding=1), (5, 0, 1)),
        (nn.Conv3d(3, 5, 1, padding="same"), (5, 3, 1)),
        (nn.ConvTranspose2d(3, 5, 2), (5, 0, 1)),
        (nn.BatchNorm2d(5), (5, 5, 1)),
        (nn.GroupNorm(1, 5), (5, 5, 1)),
        (nn.LayerNorm(5), (5, 5, -1)),
        (nn.Embedding(9, 5), (5, 0, -1)),
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.GELU()), (5, 3, -1)),
        (nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU()), (5, 0, 1)),
        (nn.Sequential(nn.Linear(3, 5), nn.Flatten()), None),
        (nn.Sequential(), None),
        (nn.Sequential(nn.Linear(3, 5), nn.MaxPool1d(2)), None),
        (nn.LSTM(3, 5), None),
    ],
)
def test_classes_say_how_wide_they_are(
    module: nn.Module, told: tuple[int, int, int] | None
) -> None:
    assert read(module) == told


@pytest.mark.parametrize(
    ("module", "x", "blueprint"),
    [
        (nn.Linear(16, 8), X, "input_mlp"),
        (nn.Sequential(nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 8)), X, "input_mlp"),
        (nn.LayerNorm(16), X, "bottleneck"),
        (nn.Conv2d(3, 8, 3), torch.randn(2, 3, 6, 6), "bottleneck"),
        (nn.BatchNorm2d(8), torch.randn(2, 8, 6, 6), "bottleneck"),
        (nn.Embedding(20, 8), torch.arange(6), "bottleneck"),
    ],
)
def test_each_kind_of_module_carries_seeds(module: nn.Module, x: Tensor, blueprint: str) -> None:
    module.eval()
    y = module(x)
    (row,) = esper_ray.plan(module, quick(targets=[""])).layers
    assert row.blueprint == blueprint
    assert row.width == y.shape[1]
    traced = esper_ray.plan(module, quick(targets=[""]), sample=x)
    assert traced.layers == (row,)
    esper_ray.attach(module, quick(targets=[""]))
    assert torch.equal(module(x), y)


class Block(nn.Module):
    """A module that no table knows, with a tuple for output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.unused = nn.Linear(16, 12), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        y = self.inner(x)
        return y, {"hidden": y.transpose(1, -1)}


def test_a_sample_shows_the_width_of_an_unknown_module() -> None:
    model = Block().eval()
    config = quick(targets=[""], output=Output(0))
    with pytest.raises(ConfigError, match="output width of layer '', a Block, is unknown") as told:
        esper_ray.plan(model, config)
    assert "sample=" in told.value.hint
    y = model(X)[0]
    drawn = torch.get_rng_state()
    for sample in (X, (X,), {"x": X}):
        (row,) = esper_ray.plan(model, config, sample=sample).layers
        assert (row.width, row.blueprint) == (12, "input_mlp")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert list(model._forward_hooks) == []
    session = esper_ray.attach(model, config, sample=X)
    assert torch.equal(model(X)[0], y)
    session.save("memory://tuple")
    again = Block()
    esper_ray.restore(again, "memory://tuple")
    assert torch.equal(again.eval()(X)[0], y)


def test_a_width_can_be_given_instead() -> None:
    (row,) = esper_ray.plan(Block(), quick(targets=[""], output=Output(0), width=12)).layers
    assert (row.width, row.blueprint) == (12, "bottleneck")


def test_a_sample_shows_what_cannot_carry_seeds() -> None:
    with pytest.raises(ConfigError, match="layer 'unused' is not called"):
        esper_ray.plan(Block(), quick(targets=["unused"]), sample=X)
    with pytest.raises(ConfigError, match="layer '' cannot carry seeds: a tuple has no") as told:
        esper_ray.plan(Block(), quick(targets=[""]), sample=X)
    assert "output=Output" in told.value.hint


def test_the_projection_of_attention_is_no_target() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16)
    assert layers(encoder, targets=[nn.Linear]) == ["linear1", "linear2"]


def test_seeds_inside_an_encoder_layer_run_in_eval_mode_too() -> None:
    torch.manual_seed(0)
    encoder, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(3, 4, 8)
    with torch.no_grad():
        before = encoder(x)
        esper_ray.attach(encoder, quick(targets=["linear2"]))
        assert torch.allclose(encoder(x), before, atol=1e-6)
        seeds = encoder.get_submodule("linear2.esper_seeds")
        assert isinstance(seeds, LayerSeeds)
        walk(seeds, [0, 1, 2, 3], ExtendedLifecycle.STABILIZATION)
        randomise(seeds)
        assert not torch.allclose(encoder(x), before, atol=1e-2)


def test_a_plan_says_what_attach_makes() -> None:
    plan = esper_ray.plan(mlp(), quick(targets=["0"], seeds_per_layer=5))
    (row,) = plan.layers
    assert (row.kind, row.width, row.seeds, row.chunk) == ("Linear", 24, 5, 5)
    assert row.host_parameters == 16 * 24 + 24
    model = mlp()
    session = esper_ray.attach(model, quick(targets=["0"], seeds_per_layer=5))
    assert row.seed_parameters == sum(p.numel() for p in session.parameters())
    assert str(plan).splitlines()[0].split()[:3] == ["layer", "kind", "width"]
    assert str(plan).splitlines()[1].split()[:3] == ["0", "Linear", "24"]


def test_attaching_twice_or_in_part_is_refused() -> None:
    model = mlp()
    with pytest.raises(ConfigError, match="layer '2' has 4 features, too few for 5 seeds"):
        esper_ray.attach(model, quick(targets=["0", "2"], seeds_per_layer=5))
    assert list(model.state_dict()) == list(mlp().state_dict())
    esper_ray.attach(model, quick())
    with pytest.raises(ConfigError, match="layer '0' carries seeds already"):
        esper_ray.attach(model, quick())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "'targets' is missing"),
        ({"targets": []}, "targets"),
        ({"targets": [3]}, "3 is no pattern, class or function"),
        ({"targets": ["0"], "epoch_step": 2}, "unknown key 'epoch_step'; the nearest is 'epoch_st"),
        ({"targets": ["0"], "epoch_steps": 0}, "epoch_steps"),
        ({"targets": ["0"], "grafting": {"ramp": 3}}, "unknown key 'grafting.ramp'"),
    ],
)
def test_settings_that_cannot_be_used_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SeedConfig(**values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blueprint": "tulip"}, "no blueprint is named 'tulip'"),
        ({"blueprint": "autoencoder"}, "does not fit blueprint 'autoencoder'"),
        ({"blueprint": "input_mlp", "targets": ["1"], "width": 24}, "reads the host layer's input"),
    ],
)
def test_a_blueprint_must_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        esper_ray.attach(mlp(), quick(**changes))


def test_reconstruction_has_a_blueprint_of_its_own() -> None:
    (row,) = esper_ray.plan(mlp(), quick(objective="reconstruction")).layers
    assert row.blueprint == "autoencoder"
