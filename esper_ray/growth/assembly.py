"""From import strings and patterns to stages whose modules carry seeds."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import ModuleType

import torch
from torch import Tensor, nn

from esper_ray.errors import ConfigError, NoMatch
from esper_ray.growth.shard import LayerPart, split_host, why_whole
from esper_ray.growth.spec import LayerSpec, StageSpec
from esper_ray.keyed_random import reseed, stream_key
from esper_ray.layers import LayerSeeds, Output, attach_seeds
from esper_ray.layers.columns import Border, Shards, split_border
from esper_ray.layers.mlp import is_mlp
from esper_ray.layers.told import read
from esper_ray.models import StageFactory


def load_module(factory: str) -> ModuleType:
    """The module of `package.module:function`; importing it may register what it defines."""
    return importlib.import_module(factory.partition(":")[0])


def load_factories(factory: str, args: Mapping[str, object]) -> list[StageFactory]:
    """Call `package.module:function` with `args`; ConfigError where it yields no stages."""
    function_name = factory.partition(":")[2]
    try:
        stages = list(getattr(load_module(factory), function_name)(**args))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"model.factory {factory!r} cannot be used: {error}",
            "give package.module:function and its arguments in model.args",
        ) from error
    if not stages or not all(isinstance(stage, StageFactory) for stage in stages):
        raise ConfigError(
            f"model.factory {factory!r} must return a list of StageFactory", "see esper_ray.models"
        )
    return stages


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """A module found in a stage: full name, kind, output shape after the samples, weights.

    Seeds divide dimension `feature_dim` of the output. `why_whole` says why it cannot be split over
    several actors, if it cannot.

    `inputs` are the features of its input, 0 unless that is one float tensor shaped like the
    output but for the last dimension. `mlp` says whether seeds should read it.
    """

    stage: int
    layer_id: str
    path: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    inputs: int = 0
    mlp: bool = False
    feature_dim: int = -1
    why_whole: str = ""

    @property
    def width(self) -> int:
        """Features of the output."""
        return self.shape[self.feature_dim if self.feature_dim < 0 else self.feature_dim - 1]


def inspect_stages(stages: Sequence[StageFactory], sample: Tensor) -> list[list[ModuleInfo]]:
    """Every module of every stage, by running `sample` through them on the meta device."""
    found: list[list[ModuleInfo]] = []
    x = sample.to("meta")
    for index, stage in enumerate(stages):
        modules: list[ModuleInfo] = []
        module = _build_meta(stage)
        hooks = [
            child.register_forward_hook(_Recorder(modules, index, stage.name, path))
            for path, child in module.named_modules()
            if path
        ]
        try:
            x = module(x)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            raise ConfigError(
                f"stage {stage.name!r} cannot take the data set's samples: {error}",
                "make model.args fit data.args; a stage's function must build its modules itself",
            ) from error
        for hook in hooks:
            hook.remove()
        found.append(modules)
    return found


def _build_meta(stage: StageFactory) -> nn.Module:
    try:
        with torch.device("meta"):
            return stage.build()
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"stage {stage.name!r} cannot be built: {error}", "check model.args"
        ) from error


@dataclass(frozen=True, slots=True)
class _Recorder:
    into: list[ModuleInfo]
    stage: int
    stage_name: str
    path: str

    def __call__(self, module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        if not isinstance(output, Tensor) or output.ndim < 2:
            return
        weights = sum(p.numel() for p in module.parameters())
        name, kind = f"{self.stage_name}.{self.path}", type(module).__name__
        shape, told = tuple(output.shape[1:]), read(module)
        if told is None or told.feature_dim == -1:
            inputs_read, feature_dim = _readable(inputs, output), -1
        else:
            inputs_read, feature_dim = told.inputs, told.feature_dim
        mlp = inputs_read > 0 and is_mlp(module)
        self.into.append(
            ModuleInfo(
                self.stage,
                name,
                self.path,
                kind,
                shape,
                weights,
                inputs_read,
                mlp,
                feature_dim,
                why_whole(module),
            )
        )


def _readable(inputs: tuple[object, ...], output: Tensor) -> int:
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        return 0
    x = inputs[0]
    return x.shape[-1] if x.is_floating_point() and x.shape[:-1] == output.shape[:-1] else 0


def match_targets(modules: Sequence[ModuleInfo], targets: Sequence[str]) -> list[ModuleInfo]:
    """Modules whose full name matches a pattern; NoMatch where a pattern matches none."""
    names = [module.layer_id for module in modules]
    chosen: dict[str, ModuleInfo] = {}
    for pattern in targets:
        hits = [m for m in modules if fnmatchcase(m.layer_id, pattern)]
        if not hits:
            raise no_match("seeds.targets", pattern, names)
        chosen.update((m.layer_id, m) for m in hits)
    refuse_nested(list(chosen))
    return [m for m in modules if m.layer_id in chosen]


def no_match(key: str, pattern: str, names: Sequence[str]) -> NoMatch:
    """The error of a pattern that matches none of `names`."""
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
    return NoMatch(f"{key} entry {pattern!r} matches no module", f"nearest: {', '.join(near)}")


def refuse_nested(names: Sequence[str]) -> None:
    """ConfigError where one of the modules that are to carry seeds lies inside another."""
    for name in names:
        parent = next((other for other in names if name.startswith(f"{other}.")), None)
        if parent:
            raise ConfigError(
                f"seeds.targets match {parent!r} and {name!r} inside it", "target one of the two"
            )


def build_stage(
    spec: StageSpec, shards: Shards | None = None
) -> tuple[nn.Module, list[LayerSeeds]]:
    """The stage's module with seeds attached to its target modules, and those seeds.

    Of a shard's layers only its part is left, and `shards` puts the parts together.
    """
    stage = load_factories(spec.factory, spec.factory_args)[spec.index]
    reseed(stream_key(spec.run_seed, "host", spec.index))
    module = stage.build()
    layers = [_attach(module, layer, spec, shards) for layer in spec.layers]
    if spec.dtype != "float32":
        module.to(getattr(torch, spec.dtype))
    return module.to(spec.device), layers


def _attach(
    module: nn.Module, layer: LayerSpec, spec: StageSpec, shards: Shards | None
) -> LayerSeeds:
    host = module.get_submodule(layer.path)
    part = LayerPart.of(layer.width, layer.num_seeds, layer.chunk_sizes, spec.shard)
    seeds = LayerSeeds(
        part.width,
        part.seeds,
        layer.layer_id,
        inputs=layer.inputs,
        blueprint_name=spec.seeds.blueprint,
        hidden=spec.seeds.hidden,
        stream=str(spec.run_seed),
        chunk_sizes=part.sizes,
        chunk_width=part.chunk_width,
        first_seed=part.first,
        host_weights=sum(p.numel() for p in host.parameters()),
    )
    if spec.shard.count > 1:
        split_host(host, part.rows)
    attach_seeds(host, seeds, Output(feature_dim=layer.feature_dim))
    if shards is not None:
        border = Border(layer.layer_id, shards, part.rows.start, layer.feature_dim)
        split_border(host, border)
    return seeds
