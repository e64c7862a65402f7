"""Where seeds go: what is known of a module's output and input before it carries any."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from esper_ray.errors import ConfigError
from esper_ray.layers import Output, host_input
from esper_ray.layers.mlp import elementwise, is_mlp
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


class Told(NamedTuple):
    """What a module's class says: features out, features in if they can be read, and where."""

    width: int
    inputs: int
    feature_dim: int = -1


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


# ---- what classes say --------------------------------------------------------------------------

_Conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_Transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ByChannel = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def _of_conv(conv: Any) -> Told:
    point = {*conv.kernel_size, *conv.stride} == {1} and conv.padding in {"same", "valid"} | {
        (0,) * n for n in (1, 2, 3)
    }
    return Told(conv.out_channels, conv.in_channels if point else 0, 1)


_SAYS: tuple[tuple[tuple[type[nn.Module], ...], Callable[[Any], Told]], ...] = (
    ((nn.Linear,), lambda m: Told(m.out_features, m.in_features)),
    (_Conv, _of_conv),
    (_Transposed, lambda m: Told(m.out_channels, 0, 1)),
    (_ByChannel, lambda m: Told(m.num_features, m.num_features, 1)),
    ((nn.GroupNorm,), lambda m: Told(m.num_channels, m.num_channels, 1)),
    (
        (nn.LayerNorm, nn.RMSNorm),
        lambda m: Told(m.normalized_shape[-1], m.normalized_shape[-1]),
    ),
    ((nn.Embedding, nn.EmbeddingBag), lambda m: Told(m.embedding_dim, 0)),
)


def read(module: nn.Module) -> Told | None:
    """What the class of a module says of its output and input; None if it says nothing."""
    if isinstance(module, nn.Sequential):
        return _of_sequential(module)
    return next((say(module) for kinds, say in _SAYS if isinstance(module, kinds)), None)


def _of_sequential(module: nn.Sequential) -> Told | None:
    """By the last child that says, if what follows it works on each element alone."""
    children = list(module)
    last = next((c for c in reversed(children) if not elementwise(c)), None)
    told = None if last is None else read(last)
    if told is None:
        return None
    first = next(c for c in children if not elementwise(c))
    inner = read(first)
    return told._replace(inputs=inner.inputs if inner is not None and is_mlp(module) else 0)


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
