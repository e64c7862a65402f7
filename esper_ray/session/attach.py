"""From patterns to modules that carry seeds, and back."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper_ray.blueprints import blueprint
from esper_ray.errors import ConfigError, NoMatch
from esper_ray.growth.objectives import objective
from esper_ray.layers import LayerSeeds, Output, attach_seeds, detach_seeds, host_input
from esper_ray.layers.hook import CHILD
from esper_ray.seeds import ChunkManager
from esper_ray.session.config import SeedConfig, Target
from esper_ray.session.session import Evaluate, SeedSession


@dataclass(frozen=True, slots=True)
class LayerTarget:
    """One matched module: features of its output, and of its input where seeds can read that."""

    name: str
    kind: str
    width: int
    inputs: int
    seeds: int
    chunk: int
    blueprint: str
    parameters: int
    output: Output


_Known = Callable[[Any], tuple[int, int, int]]
_KNOWN: Mapping[type[nn.Module], _Known] = {
    nn.Linear: lambda m: (m.out_features, m.in_features, -1),
    nn.Embedding: lambda m: (m.embedding_dim, 0, -1),
    nn.LayerNorm: lambda m: (m.normalized_shape[-1], m.normalized_shape[-1], -1),
    nn.BatchNorm1d: lambda m: (m.num_features, m.num_features, 1),
    nn.BatchNorm2d: lambda m: (m.num_features, m.num_features, 1),
    nn.GroupNorm: lambda m: (m.num_channels, m.num_channels, 1),
    nn.Conv1d: lambda m: (m.out_channels, _pointwise(m), 1),
    nn.Conv2d: lambda m: (m.out_channels, _pointwise(m), 1),
}
"""Class -> (features out, features in that a seed can read beside them, feature dimension)."""


def _pointwise(conv: nn.Conv1d | nn.Conv2d) -> int:
    plain = set(conv.kernel_size) | set(conv.stride) == {1}
    return conv.in_channels if plain else 0


def plan(model: nn.Module, config: SeedConfig, sample: Any = None) -> list[LayerTarget]:
    """What `attach` would do, one row per module; touches nothing.

    `sample` is what the model is called with (a tensor, or a tuple of arguments); it is needed
    where a module's class does not tell its features: ConfigError then. NoMatch where a target
    matches nothing.
    """
    matched = _matched(model, config)
    seen = _observe(model, matched, config, sample)
    return [_target(name, module, seen[name], config) for name, module in matched.items()]


def attach(
    model: nn.Module,
    config: SeedConfig,
    optimizer: Optimizer | None = None,
    evaluate: Evaluate | None = None,
    sample: Any = None,
) -> SeedSession:
    """Give the model seeds, in place; its output is the same, bit for bit, until one is blended in.

    `optimizer` is the host's own, and may not hold seeds. `evaluate(model)` returns the loss of
    each sample of a gate split, (samples,), always in the same order: without it no seed is ever
    judged, so none gets further than TRAINING. `sample` as for `plan`.
    """
    targets = plan(model, config, sample)
    layers = []
    for target in targets:
        seeds = LayerSeeds(
            target.width,
            target.seeds,
            target.name,
            inputs=target.inputs,
            blueprint_name=target.blueprint,
            hidden=config.hidden,
            stream=str(config.seed),
            host_weights=target.parameters,
        )
        host = model.get_submodule(target.name)
        seeds.to(_device(host, model))
        layers.append(attach_seeds(host, seeds, target.output).train(host.training))
    return SeedSession(model, layers, config, optimizer, evaluate)


def detach(model: nn.Module, discard: bool = False) -> None:
    """Take all seeds away: the host as trained. ConfigError where one is blended in, unless
    `discard`."""
    carriers = [(n, m) for n, m in model.named_modules() if hasattr(m, CHILD)]
    if not carriers:
        raise ConfigError("the model carries no seeds", "attach some first")
    for name, module in carriers:
        seeds = module.get_submodule(CHILD)
        blended = isinstance(seeds, LayerSeeds) and len(seeds.rows("blended"))
        if blended and not discard:
            raise ConfigError(
                f"{blended} seeds of layer {name!r} are part of the model's output",
                "pass discard=True to lose what they have learned",
            )
    for _, module in carriers:
        detach_seeds(module)


def _matched(model: nn.Module, config: SeedConfig) -> dict[str, nn.Module]:
    modules = {n: m for n, m in model.named_modules() if not _is_seeds(n)}
    chosen: dict[str, nn.Module] = {}
    for target in config.targets:
        hits = {n: m for n, m in modules.items() if _fits(target, n, m)}
        if not hits:
            said = repr(target if isinstance(target, str) else _called(target))
            near = difflib.get_close_matches(said.strip("'"), modules, n=3, cutoff=0.0)
            raise NoMatch(f"target {said} matches no module", f"nearest: {', '.join(near)}")
        chosen |= hits
    kept = {n: m for n, m in chosen.items() if not any(_fits(t, n, m) for t in config.exclude)}
    for name in kept:
        outer = next((other for other in kept if name.startswith(f"{other}.")), None)
        if outer:
            raise ConfigError(f"targets match {outer!r} and {name!r} inside it", "exclude one")
    return {n: m for n, m in modules.items() if n in kept}


def _is_seeds(name: str) -> bool:
    return CHILD in name.split(".")


def _called(target: object) -> str:
    return getattr(target, "__name__", repr(target))


def _fits(target: Target, name: str, module: nn.Module) -> bool:
    if isinstance(target, str):
        return fnmatchcase(name, target)
    if isinstance(target, type):
        return isinstance(module, target)
    return bool(target(name, module))


def _observe(
    model: nn.Module, matched: Mapping[str, nn.Module], config: SeedConfig, sample: Any
) -> dict[str, tuple[int, int, Output]]:
    """(width, inputs, output) of each module, told by its class or by a forward of `sample`."""
    found: dict[str, tuple[int, int, Output]] = {}
    for name, module in matched.items():
        told = _told(module)
        if told is not None and config.output is None:
            width, inputs, dim = told
            found[name] = width, inputs, Output(feature_dim=dim)
    unknown = {n: m for n, m in matched.items() if n not in found}
    if unknown and sample is None:
        name, module = next(iter(unknown.items()))
        raise ConfigError(
            f"the features of {name!r}, a {type(module).__name__}, are not known beforehand",
            "pass sample=, what the model is called with",
        )
    if unknown:
        found |= _traced(model, unknown, config.output or Output(), sample)
    return found


def _told(module: nn.Module) -> tuple[int, int, int] | None:
    return _KNOWN[type(module)](module) if type(module) in _KNOWN else None


def _traced(
    model: nn.Module, modules: Mapping[str, nn.Module], output: Output, sample: Any
) -> dict[str, tuple[int, int, Output]]:
    found: dict[str, tuple[int, int, Output]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            h, u = output.find(result), host_input(args, kwargs)
            inputs = 0
            if u is not None:
                u = u.movedim(output.feature_dim, -1)
                inputs = u.shape[-1] if u.shape[:-1] == h.shape[:-1] else 0
            found[name] = h.shape[-1], inputs, output

        return hook

    handles = [m.register_forward_hook(note(n), with_kwargs=True) for n, m in modules.items()]
    training = model.training
    model.eval()  # a look must not move running statistics
    try:
        with torch.no_grad():
            model(*(sample if isinstance(sample, tuple) else (sample,)))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    missing = [name for name in modules if name not in found]
    if missing:
        raise ConfigError(f"the model never calls {missing[0]!r}", "exclude it")
    return found


def _target(
    name: str, module: nn.Module, seen: tuple[int, int, Output], config: SeedConfig
) -> LayerTarget:
    width, inputs, output = seen
    chosen = config.blueprint
    if chosen == "auto":
        chosen = "input_mlp" if inputs and config.objective != "reconstruction" else "bottleneck"
    objective(config.objective, blueprint(chosen))
    seeds = config.seeds_per_layer
    return LayerTarget(
        name=name,
        kind=type(module).__name__,
        width=width,
        inputs=inputs,
        seeds=seeds,
        chunk=ChunkManager(width, seeds).chunk_width,
        blueprint=chosen,
        parameters=sum(p.numel() for p in module.parameters()),
        output=output,
    )


def _device(host: nn.Module, model: nn.Module) -> torch.device:
    for source in (host, model):
        parameter: Tensor | None = next(source.parameters(), None)
        if parameter is not None:
            return parameter.device
    return torch.device("cpu")
