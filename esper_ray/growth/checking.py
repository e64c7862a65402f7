"""Steps made again under other conditions, and what a stage looks like after one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from esper_ray.events.messages import StageReport
from esper_ray.growth import snapshot
from esper_ray.growth.governor import StepCheck, Trial
from esper_ray.growth.stage import BATCH, OTHER_BATCH, Stage
from esper_ray.layers.hook import CHILD


def end_epoch(stage: Stage, epoch: int) -> StageReport:
    """The stage's own report, with the name of a host tensor that is not finite, if there is one.

    Weights that the last step of an epoch has broken would show in no loss of that epoch.
    """
    broken = _first_broken(stage, snapshot.live_host_tensors(stage))
    return replace(stage.end_epoch(epoch), broken="" if broken is None else ": ".join(broken))


class Watch:
    """The first output of a module, in the order of the computation, that is not finite."""

    def __init__(self) -> None:
        self.output: tuple[str, str] | None = None

    def hook(self, layer: str) -> object:
        """A forward hook for the module of this name."""

        def look(_module: nn.Module, _inputs: object, out: object) -> None:
            broken = isinstance(out, Tensor) and not bool(out.detach().isfinite().all())
            if broken and self.output is None:
                self.output = layer, "output"

        return look


@contextmanager
def trying(stage: Stage, trial: Trial) -> Iterator[Watch]:
    """Have the steps of a stage made as `trial` says, and watched, for as long as this lasts."""
    watch = Watch()
    with ExitStack() as stack:
        for layer_id, ids in trial.off.items():
            if layer_id in stage.trainers:
                layer = stage.trainers[layer_id].layer
                alpha = layer.state.alpha.clone()
                own = range(layer.first_seed, layer.first_seed + len(alpha))
                alpha[[own.index(seed) for seed in ids if seed in own]] = 0
                stack.enter_context(layer.under(alpha[None]))
        for path, module in stage.module.named_modules():
            if CHILD not in path.split("."):
                hook = watch.hook(_named(stage, path))
                stack.callback(module.register_forward_hook(hook).remove)
        stage.batch_stream = OTHER_BATCH if trial.other_batch else BATCH
        stack.callback(setattr, stage, "batch_stream", BATCH)
        yield watch


def check(stage: Stage, watch: Watch) -> StepCheck:
    """What a stage looks like after a step; waits for the device."""
    loss = float(stage.losses[-1]) if stage.spec.last else math.nan
    gradients = {
        f"gradient/{name}": weight.grad
        for name, weight in reversed(stage.host_parameters.items())
        if weight.grad is not None
    }
    broken = _first_broken(stage, {**gradients, **snapshot.live_host_tensors(stage)})
    return StepCheck(loss, watch.output, broken, _steepest(stage))


def _first_broken(stage: Stage, tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    floating = {name: value for name, value in tensors.items() if value.is_floating_point()}
    if not floating:
        return None
    device = next(iter(floating.values())).device
    finite = torch.stack([value.isfinite().all().to(device) for value in floating.values()])
    names = zip(floating, finite.tolist(), strict=True)
    first = next((name for name, good in names if not good), None)
    return None if first is None else _layer_and_tensor(stage, first)


def _steepest(stage: Stage) -> tuple[float, str, str]:
    """The parameter whose gradient has the largest Euclidean norm."""
    found = (-math.inf, _named(stage, ""), "output")
    for name, weight in stage.host_parameters.items():
        if weight.grad is not None:
            found = max(
                found, (float(weight.grad.norm()), *_layer_and_tensor(stage, f"gradient/{name}"))
            )
    return found


def _layer_and_tensor(stage: Stage, name: str) -> tuple[str, str]:
    """ "adam/hidden.0.weight/exp_avg" as ("stage.hidden.0", "exp_avg of weight")."""
    kind, _, rest = name.partition("/")
    full, _, moment = rest.partition("/")
    path, _, tensor = full.rpartition(".")
    about = {"gradient": "gradient of ", "adam": f"{moment} of "}.get(kind, "")
    return _named(stage, path), f"{about}{tensor}"


def _named(stage: Stage, path: str) -> str:
    return f"{stage.spec.name}.{path}" if path else stage.spec.name
