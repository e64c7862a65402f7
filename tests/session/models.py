"""A small problem, and settings under which seeds go through their whole life in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import esper_ray
from esper_ray import SeedConfig, SeedSession

MINIMA = {
    "TRAINING": 3,
    "GRAFTING": 3,
    "STABILIZATION": 1,
    "EVALUATING": 2,
    "FINE_TUNING": 2,
}
EASY = {
    "alpha_one_loss_ratio_max": 2.0,
    "delta_ratio_max": 5.0,
    "improvement_min": 0.0,
    "stability_min": 0.3,
    "final_stability_min": 0.3,
    "inconclusive_epochs": 10,
}

_draw = torch.Generator().manual_seed(3)
X = torch.randn(600, 16, generator=_draw)
Y = (X @ torch.randn(16, 4, generator=_draw) + 0.8 * torch.sin(3 * X[:, :4])).argmax(1)
GATE = (X[400:], Y[400:])


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))


def gate_losses(model: nn.Module) -> Tensor:
    return cross_entropy(model(GATE[0]), GATE[1], reduction="none")


def quick(**changes: Any) -> SeedConfig:
    """Epochs of four steps, each state as short as can be."""
    values: dict[str, Any] = {
        "targets": ["0"],
        "seeds_per_layer": 4,
        "epoch_steps": 4,
        "lr": 0.01,
        "grafting": {"ramp_epochs": 3, "strategy": "linear"},
        "lifecycle": {"germinate_after": 1, "minimum_epochs": MINIMA, "gates": EASY},
    }
    return SeedConfig(**values | changes)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def attached(
    model: nn.Module | None = None,
    evaluate: Callable[[nn.Module], Tensor] | None = gate_losses,
    **changes: Any,
) -> tuple[nn.Module, torch.optim.Optimizer, SeedSession]:
    """A model with seeds and the optimiser of its host."""
    model = mlp() if model is None else model
    optimizer = adam(model)
    session = esper_ray.attach(model, quick(**changes), optimizer=optimizer, evaluate=evaluate)
    return model, optimizer, session


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The samples of a step, whoever asks."""
    rows = torch.randint(0, 400, (32,), generator=torch.Generator().manual_seed(step))
    return X[rows], Y[rows]


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, session: SeedSession | None, steps: range
) -> list[float]:
    """An ordinary loop."""
    losses = []
    for step in steps:
        x, y = batch(step)
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if session is not None:
            session.step()
        losses.append(loss.item())
    return losses
