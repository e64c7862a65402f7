"""A session beside an ordinary training loop."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import esper_ray
from esper_ray.errors import ConfigError, EsperError, NotPerSample, RunFailed
from esper_ray.lifecycle import Refusal
from tests.session.models import GATE, X, adam, attached, batch, gate_losses, mlp, quick, train


def test_seeds_go_through_their_life_in_a_plain_loop() -> None:
    model, optimizer, session = attached()
    train(model, optimizer, session, range(100))
    assert "FOSSILIZED" in session.states().counts
    targets = {event.target for event in session.events}
    assert {"GERMINATED", "TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING"} <= targets
    first = session.events[0]
    assert (first.layer, first.source, first.target) == ("0", "DORMANT", "GERMINATED")
    assert first.cause == "POLICY"


def test_model_is_trained_bit_for_bit_as_without_seeds_while_none_is_blended() -> None:
    bare = mlp()
    alone = train(bare, adam(bare), None, range(20))
    model, optimizer, session = attached()
    assert train(model, optimizer, session, range(20)) == alone
    assert session.states().counts == {"TRAINING": 4}
    for name, value in bare.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_attaching_changes_neither_names_nor_classes_nor_random_numbers() -> None:
    model = mlp()
    before, drawn = list(model.state_dict()), torch.get_rng_state()
    host = model[0]
    _, _, session = attached(model)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [n for n in model.state_dict() if "esper_seeds" not in n] == before
    assert model[0] is host
    assert type(model[0]) is nn.Linear
    missing = model.load_state_dict(mlp().state_dict(), strict=False)
    assert missing.unexpected_keys == []
    assert session.steps == 0


def test_evaluation_leaves_random_numbers_and_training_flags_alone() -> None:
    def noisy(model: nn.Module) -> Tensor:
        assert not model.training
        assert not torch.is_grad_enabled()
        torch.rand(3)
        return gate_losses(model)

    model, optimizer, session = attached(evaluate=noisy)
    train(model, optimizer, session, range(3))
    model[1].eval()  # type: ignore[index]
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    train(model, optimizer, session, range(3, 4))
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert not model[1].training  # type: ignore[index]


def test_a_copy_of_a_grown_model_computes_the_same_and_pickles() -> None:
    model, optimizer, session = attached()
    train(model, optimizer, session, range(44))
    assert session.states().counts.keys() - {"DORMANT", "TRAINING", "GERMINATED"}
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (twin, loaded):
        assert torch.equal(other(X), model(X))
    before = twin(X)
    train(model, optimizer, session, range(44, 50))
    assert torch.equal(twin(X), before)


def test_zero_grad_of_the_optimizer_is_not_needed_for_seeds() -> None:
    model, optimizer, session = attached()
    train(model, optimizer, session, range(33))
    assert all(p.grad is None for p in session.parameters())


def test_step_in_eval_mode_is_refused() -> None:
    model, _, session = attached()
    model.eval()
    with pytest.raises(RuntimeError, match="eval mode"):
        session.step()


def test_an_optimizer_that_holds_seeds_is_refused() -> None:
    model, optimizer, session = attached()
    optimizer.add_param_group({"params": session.parameters()})
    with pytest.raises(ConfigError, match="holds parameters of seeds"):
        session.step()
    esper_ray.detach(model)
    with pytest.raises(ConfigError, match="carries no seeds"):
        esper_ray.detach(model)


def test_an_optimizer_that_nobody_told_of_is_found_out() -> None:
    model = mlp()
    session = esper_ray.attach(model, quick(), evaluate=gate_losses)
    with pytest.raises(ConfigError, match="layer '0' were changed by something else"):
        train(model, adam(model), session, range(60))
    assert "GRAFTING" in session.states().counts  # until then it found no gradient to step by


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.tensor(1.0), "not a tensor \\(\\)"),
        (torch.zeros(3, 2), "not a tensor \\(3, 2\\)"),
        (1.0, "float"),
        (torch.zeros(0), "no losses"),
    ],
)
def test_evaluate_must_return_a_loss_per_sample(returned: object, message: str) -> None:
    model, optimizer, session = attached(evaluate=lambda _: returned)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match=message) as caught:
        train(model, optimizer, session, range(4))
    assert isinstance(caught.value, NotPerSample)
    assert caught.value.hint


def test_evaluate_must_return_as_many_losses_each_time() -> None:
    sizes = iter(range(3, 1000))
    model, optimizer, session = attached(evaluate=lambda m: m(X[: next(sizes)])[:, 0])
    with pytest.raises(NotPerSample, match="losses, then"):
        train(model, optimizer, session, range(40))


def test_a_loss_that_is_not_a_number_is_an_error() -> None:
    model, optimizer, session = attached(evaluate=lambda m: gate_losses(m) * torch.nan)
    with pytest.raises(RunFailed, match="gate loss"):
        train(model, optimizer, session, range(4))


def test_without_evaluate_no_seed_gets_past_training() -> None:
    model, optimizer, session = attached(evaluate=None)
    for step in range(60):
        train(model, optimizer, session, range(step, step + 1))
        session.observe(loss=1.0, accuracy=0.5)
    assert session.states().counts == {"TRAINING": 4}


def test_only_finite_numbers_are_observed() -> None:
    _, _, session = attached()
    with pytest.raises(ConfigError, match="accuracy observed is nan"):
        session.observe(accuracy=float("nan"))


def test_accuracy_that_was_observed_is_kept_with_the_metrics() -> None:
    model, optimizer, session = attached()
    for step in range(24):
        session.observe(accuracy=0.75)
        train(model, optimizer, session, range(step, step + 1))
    accuracy = model.get_submodule("0.esper_seeds.state").get_buffer("metrics")[1]
    assert (accuracy == 0.75).all()


def test_hosts_of_double_precision_and_recomputed_activations_carry_seeds() -> None:
    def run(model: nn.Module, convert: Callable[[Tensor], Tensor], again: bool) -> set[str]:
        def gate(model: nn.Module) -> Tensor:
            return cross_entropy(model(convert(GATE[0])), GATE[1], reduction="none")

        optimizer = adam(model)
        session = esper_ray.attach(model, quick(), optimizer, gate)
        for step in range(60):
            x, y = batch(step)
            u = convert(x)
            scores = checkpoint(model, u, use_reentrant=False) if again else model(u)
            loss = cross_entropy(scores, y)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            session.step()
        return {event.target for event in session.events}

    assert "EVALUATING" in run(mlp().double(), Tensor.double, again=False)
    assert "EVALUATING" in run(mlp(), Tensor.float, again=True)


# ---- requests ----------------------------------------------------------------------------------


def test_requests_are_judged_at_once_and_done_when_the_epoch_ends() -> None:
    model, optimizer, session = attached(lifecycle={"germinate_after": 1000})
    told = session.request("germinate", [0, 2, 2, 9, -1])
    assert told == [
        Refusal.NONE,
        Refusal.NONE,
        Refusal.DUPLICATE_SEED,
        Refusal.UNKNOWN_SEED,
        Refusal.UNKNOWN_SEED,
    ]
    assert session.request("germinate", [0]) == [Refusal.DUPLICATE_SEED]
    assert session.states().counts == {"DORMANT": 4}
    train(model, optimizer, session, range(4))
    assert session.states()["0"].names == ("GERMINATED", "DORMANT", "GERMINATED", "DORMANT")
    assert {event.cause for event in session.events} == {"USER"}
    assert session.request("cull", [1]) != [Refusal.NONE]
    assert session.request("cancel", [0], layer="0") == [Refusal.NONE]
    train(model, optimizer, session, range(4, 8))
    assert session.states()["0"].counts == {"CANCELLED": 1, "DORMANT": 2, "TRAINING": 1}


def test_a_rollback_restores_the_output_of_the_host() -> None:
    model, optimizer, session = attached()
    train(model, optimizer, session, range(32))
    grafting = session.states()["0"].names
    assert grafting == ("GRAFTING",) * 4
    assert session.request("rollback", [0, 1, 2, 3]) == [Refusal.NONE] * 4
    train(model, optimizer, session, range(32, 36))
    assert session.states().counts == {"ROLLED_BACK": 4}
    bare = copy.deepcopy(model)
    esper_ray.detach(bare)
    assert torch.equal(bare(X), model(X))


def test_unknown_actions_and_layers_are_refused() -> None:
    _, _, session = attached(targets=["0", "2"])
    with pytest.raises(ConfigError, match="no action is named 'water'"):
        session.request("water", [0], "0")
    with pytest.raises(ConfigError, match="2 layers") as caught:
        session.request("germinate", [0])
    assert "'0', '2'" in caught.value.hint
    with pytest.raises(ConfigError, match="layer '1' carries no seeds"):
        session.request("germinate", [0], "1")


# ---- detach ------------------------------------------------------------------------------------


def test_detach_leaves_the_host_as_it_was_trained() -> None:
    model, optimizer, session = attached()
    train(model, optimizer, session, range(10))
    y = model(X)
    esper_ray.detach(model)
    assert torch.equal(model(X), y)
    assert list(model.state_dict()) == list(mlp().state_dict())
    with pytest.raises(EsperError, match="no more"):
        session.step()


def test_detach_refuses_to_lose_what_is_part_of_the_output() -> None:
    model, optimizer, session = attached()
    train(model, optimizer, session, range(40))
    with pytest.raises(ConfigError, match="part of the model's output"):
        esper_ray.detach(model)
    assert session.states().counts
    esper_ray.detach(model, discard=True)
    assert list(model.state_dict()) == list(mlp().state_dict())


# ---- what is shown -----------------------------------------------------------------------------


def test_states_and_sessions_are_shown_plainly() -> None:
    _, _, session = attached(targets=["0", "2"])
    assert str(session.states()) == "0: 4 DORMANT\n2: 4 DORMANT"
    assert repr(session).startswith("SeedSession at step 0\n0: 4 DORMANT")
    assert "<td>0</td><td>DORMANT</td><td>4</td>" in session._repr_html_()
    with pytest.raises(KeyError):
        session.states()["x"]


def test_a_session_needs_no_ray(tmp_path: Path) -> None:
    from tests.pages import ROOT, python

    code = (
        "import sys; import tests.session.models as m; "
        "a = m.attached(); m.train(*a, range(8)); a[2].save('memory://s'); "
        "print('ray' in sys.modules)"
    )
    del tmp_path
    assert python("-c", code, folder=ROOT).splitlines()[-1] == "False"
