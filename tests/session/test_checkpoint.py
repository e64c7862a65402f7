"""What a session saves, and how it goes on from there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import esper_ray
from esper_ray.errors import CheckpointNotFound, ConfigError, CorruptError
from esper_ray.session import SeedConfig, SeedSession
from esper_ray.storage import Root, RunCheckpoints, RunLog
from tests.pages import ROOT, python
from tests.session.models import MINIMA, adam, attached, gate_losses, mlp, quick, train


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of model, seeds and optimiser by name."""
    named = dict(model.state_dict())
    for index, state in optimizer.state_dict()["state"].items():
        named |= {f"optimizer/{index}/{k}": v for k, v in state.items() if isinstance(v, Tensor)}
    return {name: value.clone() for name, value in named.items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("saved_at", [30, 33, 39, 45, 66])
def test_a_new_process_goes_on_bit_for_bit(saved_at: int, tmp_path: Path) -> None:
    model, optimizer, session = attached()
    train(model, optimizer, session, range(saved_at))
    url = session.save(str(tmp_path / "run"))
    assert url.endswith(f"@step={saved_at}")
    losses = train(model, optimizer, session, range(saved_at, saved_at + 21))
    code = f"""
import torch, safetensors.torch, esper_ray
torch.set_num_threads(1)
from tests.session.models import *
from tests.session.test_checkpoint import everything
model = mlp()
for p in model.parameters():
    p.data.normal_()
optimizer = adam(model)
session = esper_ray.restore(model, {url!r}, optimizer=optimizer, evaluate=gate_losses)
print(train(model, optimizer, session, range({saved_at}, {saved_at + 21})))
print(session.events)
safetensors.torch.save_file(everything(model, optimizer), {str(tmp_path / "end")!r})
"""
    told = python("-c", code, folder=ROOT).splitlines()
    assert told[-2] == str(losses)
    assert told[-1] == str(session.events)
    assert_same(safetensors.torch.load_file(tmp_path / "end"), everything(model, optimizer))


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
        lambda ps: torch.optim.Adam(ps, lr=0.01, amsgrad=True),
        lambda ps: torch.optim.RMSprop(ps, lr=0.001, centered=True),
        lambda ps: torch.optim.Adagrad(ps, lr=0.01),
    ],
)
def test_optimizers_of_other_kinds_go_on(make: Callable[..., torch.optim.Optimizer]) -> None:
    ends = []
    for restored in (False, True):
        model = mlp()
        optimizer = make(model.parameters())
        if restored:
            session = esper_ray.restore(
                model, "memory://kinds@step=9", optimizer=optimizer, evaluate=gate_losses
            )
        else:
            session = esper_ray.attach(model, quick(), optimizer, gate_losses)
            train(model, optimizer, session, range(9))
            session.save("memory://kinds")
        train(model, optimizer, session, range(9, 20))
        ends.append(everything(model, optimizer))
    assert_same(*ends)


def test_an_optimizer_that_keeps_something_else_is_refused() -> None:
    model, optimizer, session = attached()
    optimizer.state[next(model.parameters())]["odd"] = {1, 2}
    with pytest.raises(ConfigError, match="keeps a set"):
        session.save("memory://odd")


def test_another_optimizer_is_refused() -> None:
    model, optimizer, session = attached()
    train(model, optimizer, session, range(2))
    session.save("memory://other-optimizer")
    fresh = mlp()
    with pytest.raises(ConfigError, match="stored optimizer differs"):
        esper_ray.restore(fresh, "memory://other-optimizer", optimizer=adam(fresh[0]))
    assert [name for name in fresh.state_dict() if "seeds" in name] == []


def test_a_session_goes_back_to_what_it_saved() -> None:
    model, optimizer, session = attached()
    train(model, optimizer, session, range(33))
    first = session.save("memory://back")
    kept = everything(model, optimizer)
    train(model, optimizer, session, range(33, 47))
    session.save("memory://back")
    session.restore(first)
    assert session.steps == 33
    assert_same(everything(model, optimizer), kept)
    train(model, optimizer, session, range(33, 36))
    session.save("memory://back")
    log = RunLog(Root.open("memory://back"))
    steps = [row["step"] for row in RunCheckpoints(log).rows()]
    assert steps == [36, 33]  # what followed 33 before was given up
    assert RunCheckpoints(log).verify() == []


def test_the_command_line_shows_what_a_session_saved(tmp_path: Path) -> None:
    model, optimizer, session = attached()
    train(model, optimizer, session, range(8))
    session.save(str(tmp_path))
    for command, shown in (("list", "8"), ("show", "0: 4 "), ("verify", "ok")):
        words = ("-m", "esper_ray", "checkpoints", command, str(tmp_path))
        assert shown in python(*words, folder=ROOT)


def test_a_session_that_saves_where_another_has_is_told(caplog: pytest.LogCaptureFixture) -> None:
    for warned in (False, True):
        model, optimizer, session = attached()
        train(model, optimizer, session, range(2))
        session.save("memory://shared")
        session.save("memory://shared")
        assert ("set aside" in caplog.text) is warned
    assert len(caplog.records) == 1


def test_requests_that_wait_are_saved() -> None:
    _, _, session = attached(lifecycle={"germinate_after": 1000})
    session.request("germinate", [1])
    session.observe(accuracy=0.25)
    session.save("memory://waiting")
    model = mlp()
    optimizer = adam(model)
    again = esper_ray.restore(model, "memory://waiting", optimizer=optimizer)
    train(model, optimizer, again, range(4))
    assert again.states()["0"].names[1] == "GERMINATED"


def test_settings_are_saved() -> None:
    _, _, session = attached(seeds_per_layer=3, hidden=5, blueprint="low_rank", seed=7)
    session.save("memory://settings")
    model = mlp()
    esper_ray.restore(model, "memory://settings@latest")
    seeds = model.get_submodule("0.esper_seeds")
    assert seeds.bank.kind.name == "low_rank"  # type: ignore[union-attr]
    assert seeds.bank.shape.hidden == 5  # type: ignore[union-attr]
    assert seeds.stream == "7/seed/0"


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="no checkpoint is stored"):
        esper_ray.restore(mlp(), str(tmp_path / "nowhere"))
    _, _, session = attached()
    session.save(str(tmp_path / "run"))
    with pytest.raises(CheckpointNotFound, match="it has step=0"):
        esper_ray.restore(mlp(), f"{tmp_path / 'run'}@step=3")


@pytest.mark.parametrize("pattern", ["segments/sha256/*/*", "commits/*"])
def test_damage_is_found_and_changes_nothing(pattern: str, tmp_path: Path) -> None:
    _, _, session = attached()
    session.save(str(tmp_path))
    file = next(tmp_path.glob(pattern))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.chmod(0o644)
    file.write_bytes(data)
    model = mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CorruptError):
        esper_ray.restore(model, str(tmp_path))
    assert_same(dict(model.state_dict()), before)


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def other_head() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 5))


def other_kind() -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.Linear(16, 24), nn.Linear(24, 4))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (wide, "layer '0' of the checkpoint has 24 features, this model's has 32"),
        (other_head, "parameter 2.bias is float32 \\(4,\\) in the checkpoint and float32 \\(5,\\)"),
        (other_kind, "layer '0' of the checkpoint is a Linear, this model has a ReLU there"),
        (nn.Identity, "this model has no such module"),
    ],
)
def test_another_architecture_is_named(build: Callable[[], nn.Module], message: str) -> None:
    _, _, session = attached()
    session.save("memory://architecture")
    model = build()
    with pytest.raises(ConfigError, match=message):
        esper_ray.restore(model, "memory://architecture")
    assert [name for name in model.state_dict() if "seeds" in name] == []


def test_a_session_refuses_what_others_have_saved() -> None:
    _, _, session = attached()
    session.save("memory://refuses")
    for changes, message in (
        ({"targets": ["2"], "seeds_per_layer": 2}, "layer '2' differs from '0'"),
        ({"blueprint": "affine"}, "blueprint is 'affine', not 'input_mlp'"),
        ({"epoch_steps": 5}, "saved with other epoch_steps"),
        ({"targets": ["0", "2"]}, "saved with other layers"),
    ):
        _, _, other = attached(**changes)
        with pytest.raises(ConfigError, match=message):
            other.restore("memory://refuses")


def test_checkpoints_of_a_run_are_not_for_a_session(tmp_path: Path) -> None:
    log = RunLog(Root.open(str(tmp_path)))
    record = log.open_epoch(None)
    log.commit(record.next_seq, {"run": "digits", "step": 4, "epoch": 1}, [])
    with pytest.raises(ConfigError, match="checkpoints of a run"):
        esper_ray.restore(mlp(), str(tmp_path))


def test_many_seeds_are_restored() -> None:
    def session_of(model: nn.Module, load: bool) -> SeedSession:
        if load:
            return esper_ray.restore(model, "memory://many", evaluate=gate_losses)
        return esper_ray.attach(model, config, evaluate=gate_losses)

    lifecycle: dict[str, Any] = {"germinate_after": 0, "max_growing": 70, "minimum_epochs": MINIMA}
    config = SeedConfig(
        targets=["0"], seeds_per_layer=90, epoch_steps=2, hidden=2, lifecycle=lifecycle
    )
    ends = []
    for load in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 90), nn.ReLU(), nn.Linear(90, 4))
        session = session_of(model, load)
        own = {id(p) for p in session.parameters()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if id(p) not in own], lr=0.1)
        if not load:
            train(model, optimizer, session, range(7))
            session.save("memory://many")
        train(model, optimizer, session, range(7, 12))
        ends.append((model(torch.ones(2, 16)), session.states()))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    assert ends[0][1].counts["DORMANT"] == 20
