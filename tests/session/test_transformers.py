"""A model that is not ours: a GPT-2 of the transformers package, tiny and without any download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import esper_ray
from esper_ray import Output, SeedConfig
from tests.session.models import EASY, MINIMA

transformers = pytest.importorskip("transformers", reason="needs the hosts extra")

WORDS = 40
TEXT = torch.randint(0, WORDS, (1, 16), generator=torch.Generator().manual_seed(5)).repeat(24, 2)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=16,
        vocab_size=WORDS,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        resid_pdrop=0.1,
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """(samples,) mean loss of each sequence."""
    logits = model(input_ids=ids).logits[:, :-1]
    return cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def config(**changes: Any) -> SeedConfig:
    values: dict[str, Any] = {
        "targets": ["transformer.h.*.mlp"],
        "seeds_per_layer": 4,
        "epoch_steps": 2,
        "lr": 0.01,
        "grafting": {"ramp_epochs": 3, "strategy": "linear"},
        "lifecycle": {"germinate_after": 0, "minimum_epochs": MINIMA, "gates": EASY},
    }
    return SeedConfig(**values | changes)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, session: Any, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)  # dropout
        loss = losses(model, TEXT[step % 16 : step % 16 + 8]).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        session.step()


def gate(model: nn.Module) -> Tensor:
    return losses(model, TEXT[16:])


def test_gpt2_grows_is_saved_restored_and_exported(tmp_path: Path) -> None:
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sample = {"input_ids": TEXT[:2]}
    y = model.eval()(**sample).logits
    session = esper_ray.attach(model, config(), optimizer, gate, sample=sample)
    assert [layer.layer for layer in session.states().layers] == [
        "transformer.h.0.mlp",
        "transformer.h.1.mlp",
    ]
    assert torch.equal(model(**sample).logits, y)
    train(model.train(), optimizer, session, range(13))
    assert "GRAFTING" in session.states().counts
    session.save(str(tmp_path / "run"))

    again = gpt2().train()
    other = torch.optim.AdamW(again.parameters(), lr=1e-3)
    resumed = esper_ray.restore(again, str(tmp_path / "run"), optimizer=other, evaluate=gate)
    for one in ((model, optimizer, session), (again, other, resumed)):
        train(*one, range(13, 22))
    ours, theirs = model.state_dict(), again.state_dict()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert session.events == resumed.events

    exported = esper_ray.export(model, sample=sample)
    assert {left.layer for left in exported.not_folded} == {
        layer.layer for layer in session.states().layers
    }
    exported.save(tmp_path / "gpt2.pt2")
    loaded = torch.export.load(tmp_path / "gpt2.pt2").module()
    expected = model.eval()(**sample).logits
    assert torch.allclose(loaded(**sample).logits, expected, atol=1e-5)


def test_a_part_of_a_tuple_carries_seeds() -> None:
    model = gpt2().eval()
    sample = {"input_ids": TEXT[:2]}
    y = model(**sample).logits
    chosen = config(targets=["transformer.h.*.attn"], output=Output(0))
    session = esper_ray.attach(model, chosen, evaluate=gate, sample=sample)
    assert torch.equal(model(**sample).logits, y)
    train(model.train(), torch.optim.SGD([nn.Parameter(torch.zeros(1))]), session, range(9))
    assert session.states().counts == {"TRAINING": 8}
