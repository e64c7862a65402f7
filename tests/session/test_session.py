"""Seeds beside an ordinary training loop."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import esper_ray
from esper_ray import SeedConfig, SeedSession
from esper_ray.blueprints import InputMlpBlueprint
from esper_ray.errors import ConfigError, NoMatch
from esper_ray.grafting import GraftingSettings
from esper_ray.layers import LayerSeeds, Output
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.lifecycle import GateSettings, LifecycleManager, Refusal
from esper_ray.policy import PolicySettings
from tests.builders import randomise, same_bits, walk
from tests.pages import blocks, python

EXAMPLE = Path(__file__).parents[2] / "examples" / "attach_plain_loop.py"
OPEN = GateSettings(
    performance_delta_min=-1.0, stability_min=0.0, improvement_min=0.0, final_stability_min=0.0
)
FAST = LifecycleManager(
    gates=OPEN,
    minimum_epochs={S.TRAINING: 1, S.GRAFTING: 2, S.STABILIZATION: 1, S.EVALUATING: 1},
)


def config(**given: Any) -> SeedConfig:
    values: dict[str, Any] = {
        "targets": ["0"],
        "seeds_per_layer": 4,
        "epoch_steps": 2,
        "hidden": 4,
        "strategy": "linear",
        "grafting": GraftingSettings(ramp_epochs=2),
        "policy": PolicySettings(germinate_after=1),
        "manager": FAST,
    }
    return SeedConfig(**{**values, **given})


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


X = torch.randn(64, 6, generator=torch.Generator().manual_seed(2))
Y = (X.sin().sum(1) > 0).long() + (X[:, 0] > 0).long()


def losses(model: nn.Module) -> Tensor:
    return cross_entropy(model(X), Y, reduction="none")


def train(model: nn.Module, session: SeedSession | None, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        loss = cross_entropy(model(X), Y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if session is not None:
            session.step()


def attached(**given: Any) -> tuple[nn.Sequential, SeedSession, torch.optim.Optimizer]:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    session = esper_ray.attach(model, config(**given), optimizer, losses)
    return model, session, optimizer


def test_seeds_go_all_the_way_in_a_plain_loop() -> None:
    model, session, optimizer = attached()
    train(model, session, optimizer, 60)
    visited = {move.target for move in session.events}
    assert {S.GERMINATED, S.TRAINING, S.GRAFTING, S.STABILIZATION, S.EVALUATING} <= visited
    assert session.states()["0"].get("FOSSILIZED", 0) > 0
    assert sum(session.states()["0"].values()) == 4
    assert model[0].weight.shape == (12, 6)


def test_until_a_seed_is_blended_in_training_is_that_of_the_bare_model() -> None:
    bare = mlp()
    bare_optimizer = torch.optim.Adam(bare.parameters(), lr=1e-2)
    model, session, optimizer = attached(manager=LifecycleManager())
    train(bare, None, bare_optimizer, 30)
    train(model, session, optimizer, 30)
    assert "TRAINING" in session.states()["0"]
    for name, parameter in bare.named_parameters():
        assert same_bits(model.get_parameter(name), parameter)


def test_without_an_evaluation_no_seed_gets_further_than_training() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    session = esper_ray.attach(model, config(), optimizer)
    train(model, session, optimizer, 40)
    assert max(move.target for move in session.events if move.target < S.FOSSILIZED) is S.TRAINING


def test_requests_are_made_at_once() -> None:
    _, session, _ = attached()
    assert session.request("germinate", [1, 2]) == [Refusal.NONE, Refusal.NONE]
    assert session.states() == {"0": {"DORMANT": 2, "GERMINATED": 2}}
    assert [(m.seed, m.target) for m in session.events] == [(1, S.GERMINATED), (2, S.GERMINATED)]
    with pytest.raises(ConfigError, match="no layer is named 'other'"):
        session.request("cull", [1], layer="other")


def test_eval_mode_is_refused() -> None:
    model, session, _ = attached()
    model.eval()
    with pytest.raises(RuntimeError, match=r"call model.train\(\)"):
        session.step()


def test_an_optimizer_that_holds_seeds_is_refused() -> None:
    model = mlp()
    session = esper_ray.attach(model, config(), None, losses)
    assert {id(p) for p in session.parameters()} < {id(p) for p in model.parameters()}
    esper_ray.detach(model)
    optimizer = torch.optim.Adam(model.parameters())
    session = esper_ray.attach(model, config(), optimizer, losses)
    optimizer.add_param_group({"params": list(session.parameters())})
    with pytest.raises(ConfigError, match="holds weights of seeds"):
        session.step()


@pytest.mark.parametrize("wrong", [lambda m: losses(m).mean(), lambda _: 0.5])
def test_an_evaluation_that_is_a_scalar_is_a_type_error(wrong: Any) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    session = esper_ray.attach(model, config(), optimizer, wrong)
    with pytest.raises(TypeError, match='reduction="none"'):
        train(model, session, optimizer, 2)
    assert model.training


def test_detaching_refuses_to_lose_what_is_blended_in() -> None:
    model, session, _ = attached()
    seeds = session.layers["0"]
    walk_to_alpha(seeds)
    with pytest.raises(ConfigError, match="2 seeds of layer '0' are part of the model's output"):
        esper_ray.detach(model)
    esper_ray.detach(model, discard=True)
    assert set(model.state_dict()) == set(mlp().state_dict())
    assert same_bits(model(X).detach(), mlp()(X).detach())
    with pytest.raises(ConfigError, match="carries no seeds"):
        esper_ray.detach(model)


def walk_to_alpha(seeds: LayerSeeds) -> None:
    seeds.layer_id = "layer"
    walk(seeds, [0, 3], S.STABILIZATION)
    randomise(seeds)
    seeds.state.alpha[[0, 3]] = 1.0
    seeds.refresh()


def test_a_model_with_seeds_is_copied_and_pickled() -> None:
    model, session, _ = attached()
    walk_to_alpha(session.layers["0"])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(twin(X).detach(), model(X).detach())


def test_old_checkpoints_of_the_host_load() -> None:
    model, _, _ = attached()
    found = model.load_state_dict(mlp().state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all(".esper_seeds." in key for key in found.missing_keys)


# ---- which modules -----------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.unused = nn.Sequential(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.attention(x, x, x)[0]
        out: Tensor = h + self.mlp(h)
        return out


TOKENS = torch.zeros(2, 5, 8)


def test_plan_reads_classes_and_touches_nothing() -> None:
    model = mlp()
    before = set(model.state_dict())
    rows = esper_ray.plan(model, config(targets=[nn.Linear], exclude=["2"], blueprint="auto"))
    assert [(r.name, r.kind, r.width, r.inputs, r.chunk, r.blueprint) for r in rows] == [
        ("0", "Linear", 12, 6, 3, "input_mlp")
    ]
    assert set(model.state_dict()) == before


def test_a_sample_tells_what_classes_do_not() -> None:
    model = Block()
    with pytest.raises(ConfigError, match="'mlp', a Sequential, are not known beforehand"):
        esper_ray.plan(model, config(targets=["mlp"]))
    [row] = esper_ray.plan(model, config(targets=["mlp"]), sample=TOKENS)
    assert (row.width, row.inputs, row.blueprint) == (8, 8, "input_mlp")
    named = config(targets=["attention"], output=Output(0))
    [row] = esper_ray.plan(model, named, sample=(TOKENS,))
    assert (row.width, row.output) == (8, Output(0))


def test_a_module_that_is_never_called_is_named() -> None:
    with pytest.raises(ConfigError, match="never calls 'unused'"):
        esper_ray.plan(Block(), config(targets=["unused"]), sample=TOKENS)


def test_convolutions_divide_their_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16))
    rows = esper_ray.plan(model, config(targets=["*"], exclude=[""]))
    found = [(r.width, r.inputs, r.output.feature_dim, r.blueprint) for r in rows]
    assert found == [
        (8, 0, 1, "bottleneck"),
        (16, 8, 1, "input_mlp"),
        (16, 16, 1, "input_mlp"),
    ]


@pytest.mark.parametrize("target", ["1.*", nn.Conv2d, lambda name, _: name == "nine"])
def test_every_target_must_match(target: Any) -> None:
    with pytest.raises(NoMatch, match="matches no module"):
        esper_ray.plan(mlp(), config(targets=["0", target]))


def test_a_module_inside_another_target_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"match 'mlp' and .* inside it"):
        esper_ray.plan(Block(), config(targets=["mlp", "mlp.0"]), sample=TOKENS)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"targets": []}, "targets must be a list"),
        ({"targets": "0"}, "targets must be a list"),
        ({"epoch_steps": 0}, "epoch_steps must be at least 1, got 0"),
        ({"seeds_per_layer": 0}, "seeds_per_layer must be at least 1"),
    ],
)
def test_impossible_settings_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(**given)


def test_states_are_shown_as_a_table() -> None:
    _, session, _ = attached()
    shown = session._repr_html_()
    assert "<td>0</td><td>4</td>" in shown


@pytest.mark.slow
def test_the_example_trains_both_models_and_keeps_seeds() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "transformer: loss" in done.stdout
    assert "FOSSILIZED" in done.stdout


def test_the_page_on_attaching_runs(tmp_path: Path) -> None:
    [script] = blocks("docs/attach.md", "python")
    told = python("-W", "error", "-c", script, folder=tmp_path).splitlines()
    assert told[0].startswith("LayerTarget(name='0', kind='Linear', width=16, inputs=8")
    assert any("TRAINING -> GRAFTING" in line for line in told)
    assert told[-1].startswith("{'0': {")


def break_seed(seeds: LayerSeeds, seed: int, how: str) -> None:
    if how == "fails":
        seeds._fused, seeds.bank.kind = None, Raising()
        return
    with torch.no_grad():
        seeds.bank.weights["w_out"][seed] = torch.nan


class Raising(InputMlpBlueprint):
    """Fails whenever it is asked."""

    def forward(self, weights: Mapping[str, Tensor], x: Tensor, u: Tensor) -> Tensor:
        raise KeyError(f"no table for {len(weights)}, {x.shape}, {u.shape}")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("how", ["NaN", "fails"])
def test_a_broken_seed_is_counted_and_leaves_by_the_table(how: str) -> None:
    slow = LifecycleManager(gates=OPEN, minimum_epochs={S.TRAINING: 1, S.GRAFTING: 1_000})
    model, session, optimizer = attached(manager=slow, grafting=GraftingSettings(ramp_epochs=500))
    while session.states()["0"].get("GRAFTING", 0) < 4:
        train(model, session, optimizer, 2)
    train(model, session, optimizer, 2)  # alphas leave 0
    seeds = session.layers["0"]
    break_seed(seeds, 2, how)
    train(model, session, optimizer, 1)
    assert model(X).isfinite().all()
    assert all(p.isfinite().all() for p in model[0].parameters(recurse=False))
    train(model, session, optimizer, 19)
    gone = {m.seed for m in session.events if m.target is S.ROLLED_BACK}
    assert gone == ({2} if how == "NaN" else {0, 1, 2, 3})
    assert all(w[2].isfinite().all() for w in seeds.bank.weights.values())
