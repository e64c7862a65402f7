"""What a model loses on the gate split, under alphas that are not its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from esper_ray.errors import NotPerSample
from esper_ray.events.messages import Evaluation, EvaluationRequest
from esper_ray.growth.evaluation import summarise, under_alphas
from esper_ray.layers import LayerSeeds

Evaluate: TypeAlias = Callable[[nn.Module], Tensor]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; training flags and random numbers go on as they were."""
    flags = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=sorted(devices, key=str)):
            yield
    finally:
        for module, training in flags:
            module.training = training


def per_sample_losses(model: nn.Module, evaluate: Evaluate) -> Tensor:
    """(samples,) losses that `evaluate` returns; NotPerSample, a TypeError, for anything else."""
    with evaluating(model):
        losses: object = evaluate(model)
    if isinstance(losses, Tensor) and losses.ndim == 1 and losses.is_floating_point():
        if len(losses) > 0:
            return losses.detach()
        raise NotPerSample("evaluate returned no losses", "give the gate split some samples")
    shown = f"a tensor {tuple(losses.shape)}" if isinstance(losses, Tensor) else repr(type(losses))
    raise NotPerSample(
        f"evaluate must return the loss of each sample, a float tensor (samples,), not {shown}",
        "compute the loss with reduction='none'; seeds are judged sample by sample",
    )


def evaluation(
    model: nn.Module,
    layers: Mapping[str, LayerSeeds],
    evaluate: Evaluate,
    request: EvaluationRequest,
) -> Evaluation:
    """Losses under each of the request's settings, one after the other; changes nothing."""
    rows: list[Tensor] = []
    for setting in range(request.settings):
        alphas = {name: rows_[setting : setting + 1] for name, rows_ in request.alphas.items()}
        with under_alphas(layers.values(), alphas):
            rows.append(per_sample_losses(model, evaluate))
        if len(rows[-1]) != len(rows[0]):
            raise NotPerSample(
                f"evaluate returned {len(rows[0])} losses, then {len(rows[-1])}",
                "return the losses of the same samples, in the same order, at every call",
            )
    losses = torch.stack(rows)
    return summarise(losses, torch.full_like(losses, torch.nan))
