"""Where seeds go: what is known of a module's output and input before it carries any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper_ray.errors import ConfigError
from esper_ray.layers import Output, host_input
from esper_ray.layers.mlp import is_mlp
from esper_ray.layers.told import Told, read
from esper_ray.session.config import SeedConfig
from esper_ray.session.evaluating import evaluating
from esper_ray.session.matching import match


@dataclass(frozen=True, slots=True)
class Site:
    """One module that carries seeds, by its name in the model; plain data."""

    layer_id: str
    kind: str
    width: int
    inputs: int
    blueprint: str
    part: int | str | None
    feature_dim: int

    @property
    def output(self) -> Output:
        """What of the module's output carries them."""
        return Output(self.part, self.feature_dim)

    def to_json(self) -> dict[str, Any]:
        """For a manifest."""
        return asdict(self)


def find_sites(model: nn.Module, config: SeedConfig, sample: Any = None) -> list[Site]:
    """The modules that `config` means; ConfigError where a width is unknown."""
    modules = match(model, config.targets, config.exclude)
    told = {name: read(module) for name, module in modules.items()}
    outputs = {name: config.output or _output(told[name]) for name in modules}
    if sample is not None:
        seen = _traced(model, modules, outputs, sample)
    else:
        seen = {name: _known(name, modules[name], told[name], config) for name in modules}
    return [
        Site(
            layer_id=name,
            kind=type(module).__name__,
            width=seen[name].width,
            inputs=seen[name].inputs,
            blueprint=config.kind_for(feeds=seen[name].inputs > 0 and is_mlp(module)),
            part=outputs[name].part,
            feature_dim=outputs[name].feature_dim,
        )
        for name, module in modules.items()
    ]


def _output(told: Told | None) -> Output:
    return Output(feature_dim=-1 if told is None else told.feature_dim)


def _known(name: str, module: nn.Module, told: Told | None, config: SeedConfig) -> Told:
    if config.width is not None:
        return Told(config.width, 0 if told is None else told.inputs)
    if told is None or config.output is not None:
        raise ConfigError(
            f"the output width of layer {name!r}, a {type(module).__name__}, is unknown",
            "pass sample=, one input of the model, or set width",
        )
    return told


# ---- what one forward shows --------------------------------------------------------------------


def _traced(
    model: nn.Module, modules: Mapping[str, nn.Module], outputs: Mapping[str, Output], sample: Any
) -> dict[str, Told]:
    """What one forward of `sample` shows; it changes nothing of the model."""
    seen: dict[str, Told] = {}
    hooks = [
        module.register_forward_hook(_Recorder(name, outputs[name], seen), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        with evaluating(model):
            call(model, sample)
    finally:
        for hook in hooks:
            hook.remove()
    for name in modules:
        if name not in seen:
            raise ConfigError(
                f"layer {name!r} is not called when the model runs its sample",
                "its weights are read by another module: target that one",
            )
    return seen


def call(model: nn.Module, sample: Any) -> Any:
    """The model on a sample: a mapping is passed by name, a tuple or list by position."""
    args, kwargs = arguments(sample)
    return model(*args, **kwargs)


def arguments(sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments that a sample stands for."""
    if isinstance(sample, Mapping):
        return (), dict(sample)
    return (tuple(sample), {}) if isinstance(sample, tuple | list) else ((sample,), {})


@dataclass(frozen=True, slots=True)
class _Recorder:
    name: str
    output: Output
    seen: dict[str, Told]

    def __call__(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        try:
            h = self.output.find(output)
        except ConfigError as error:
            raise ConfigError(
                f"layer {self.name!r} cannot carry seeds: {error.message}",
                f"{error.hint}, by output=Output(part, feature_dim)",
            ) from error
        u = host_input(args, kwargs)
        self.seen[self.name] = Told(h.shape[-1], 0 if u is None else self._inputs(u, h))

    def _inputs(self, u: Tensor, h: Tensor) -> int:
        last = self.output.find(u) if self.output.part is None else u
        return last.shape[-1] if last.shape[:-1] == h.shape[:-1] else 0


def host_device(module: nn.Module) -> torch.device:
    """Where a module's weights live, the CPU if it has none."""
    tensors = (*module.parameters(), *module.buffers())
    return tensors[0].device if tensors else torch.device("cpu")
