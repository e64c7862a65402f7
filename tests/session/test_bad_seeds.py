"""Seeds that break while they are part of a model: counted, contained, and taken out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from esper_ray import SeedSession
from esper_ray.blueprints import InputMlpBlueprint
from esper_ray.layers import LayerSeeds
from esper_ray.layers.hook import CHILD
from tests.session.models import MINIMA, X, attached, train

SLOW: dict[str, Any] = {
    "grafting": {"ramp_epochs": 500, "strategy": "linear"},
    "lifecycle": {
        "germinate_after": 1,
        "minimum_epochs": MINIMA | {"GRAFTING": 1_000},
        "gates": {"alpha_one_loss_ratio_max": 10.0, "delta_ratio_max": 10.0},
    },
}


class Raising(InputMlpBlueprint):
    """Fails whenever it is asked."""

    def forward(self, weights: Mapping[str, Tensor], x: Tensor, u: Tensor) -> Tensor:
        raise KeyError(f"no table for {len(weights)}, {x.shape}, {u.shape}")


def break_seed(seeds: LayerSeeds, how: str) -> None:
    if how == "fails":
        seeds._fused, seeds.bank.kind = None, Raising()
        return
    with torch.no_grad():
        seeds.bank.weights["w_out"].data[2] = torch.nan


def grafting(session: SeedSession) -> int:
    return session.states().counts.get("GRAFTING", 0)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("how", ["NaN", "fails"])
def test_a_broken_seed_is_counted_and_leaves_by_the_table(how: str) -> None:
    model, optimizer, session = attached(**SLOW)
    step = 0
    while grafting(session) < 4:
        assert step < 100
        train(model, optimizer, session, range(step, step + 4))
        step += 4
    train(model, optimizer, session, range(step, step + 4))  # alphas leave 0
    seeds = model.get_submodule(f"0.{CHILD}")
    assert isinstance(seeds, LayerSeeds)
    break_seed(seeds, how)
    train(model, optimizer, session, range(step + 4, step + 5))
    assert model(X).isfinite().all()
    assert all(p.isfinite().all() for p in model.get_submodule("0").parameters(recurse=False))
    train(model, optimizer, session, range(step + 5, step + 40))
    gone = {event.seed_id for event in session.events if event.target == "ROLLED_BACK"}
    assert gone == ({2} if how == "NaN" else {0, 1, 2, 3})
    assert (seeds.state.view().error_count[sorted(gone)] > 0).all()
    assert all(w.isfinite().all() for w in seeds.bank.weights.values())
