"""From a run file to what each stage and the coordinator are built from; starts nothing."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esper_ray import data
from esper_ray.actors.coordinator_spec import CoordinatorSpec
from esper_ray.blueprints import blueprint
from esper_ray.config import RunConfig
from esper_ray.config.settings import (
    grafting_settings,
    lifecycle_manager,
    policy_settings,
    seed_spec,
)
from esper_ray.data import DatasetCard
from esper_ray.errors import ConfigError
from esper_ray.growth.assembly import (
    ModuleInfo,
    inspect_stages,
    load_factories,
    match_targets,
)
from esper_ray.growth.spec import DataSpec, LayerSpec, SeedSpec, StageSpec
from esper_ray.models import StageFactory
from esper_ray.seeds.price import price


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One matched layer: where it lives and what its seeds add if each of them grows."""

    layer_id: str
    stage: str
    kind: str
    width: int
    seeds: int
    chunk: int
    host_parameters: int
    seed_parameters: int
    bytes: int


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Everything a run starts from."""

    stages: tuple[StageSpec, ...]
    layers: tuple[LayerPlan, ...]
    coordinator: CoordinatorSpec
    card: DatasetCard

    @property
    def stage_of(self) -> dict[str, int]:
        """Index of the stage that owns each layer."""
        return {layer.layer_id: stage.index for stage in self.stages for layer in stage.layers}


def plan_run(config: RunConfig) -> RunPlan:
    """Match targets and check every size; ConfigError where something does not fit."""
    dataset = data.load(config.data.name, **config.data.args)
    factories = load_factories(config.model.factory, config.model.args)
    sample, _ = dataset.train.take(torch.zeros(2, dtype=torch.int64))
    found = _modules(factories, sample)
    matched = match_targets(found, config.seeds.targets)
    config = _with_blueprint(config, matched)
    seeds = seed_spec(config.seeds)
    layers = tuple(_layer_plan(config, seeds, factories, module) for module in matched)
    source = DataSpec(
        name=config.data.name,
        args=config.data.args,
        batch_size=config.data.batch_size,
        micro_batches=config.train.micro_batches,
        evaluation_samples=config.data.evaluation_samples,
        sha256=dataset.card.sha256,
    )
    stages = tuple(
        StageSpec(
            index=index,
            count=len(factories),
            name=factory.name,
            factory=config.model.factory,
            factory_args=config.model.args,
            run_seed=config.seed,
            host_lr=config.train.lr,
            epoch_steps=config.seeds.epoch_steps,
            threads=config.cluster.threads,
            layers=tuple(_layer_spec(config, m) for m in matched if m.stage == index),
            seeds=seeds,
            data=source,
        )
        for index, factory in enumerate(factories)
    )
    return RunPlan(stages, layers, _coordinator_spec(config, len(stages), layers), dataset.card)


def _with_blueprint(config: RunConfig, matched: Sequence[ModuleInfo]) -> RunConfig:
    """The same with the blueprint by its name: a run has one, which its checkpoints hold."""
    name = config.seeds.kind_for(feeds=all(module.mlp for module in matched))
    seeds = config.seeds.model_copy(update={"blueprint": name})
    return config.model_copy(update={"seeds": seeds})


def _modules(factories: list[StageFactory], sample: Tensor) -> list[ModuleInfo]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Initializing zero-element tensors", UserWarning)
        try:
            return [module for stage in inspect_stages(factories, sample) for module in stage]
        except UserWarning as error:
            raise ConfigError("a layer of the model is of size 0", "check model.args") from error


def _layer_spec(config: RunConfig, module: ModuleInfo) -> LayerSpec:
    sizes = config.seeds.chunk_sizes
    return LayerSpec(
        layer_id=module.layer_id,
        path=module.path,
        width=module.shape[-1],
        num_seeds=config.seeds.seeds_per_layer,
        chunk_sizes=tuple(sizes) if sizes else None,
        inputs=module.inputs,
    )


def _layer_plan(
    config: RunConfig, seeds: SeedSpec, factories: list[StageFactory], module: ModuleInfo
) -> LayerPlan:
    count, width = config.seeds.seeds_per_layer, module.shape[-1]
    if count > width:
        raise ConfigError(
            f"layer {module.layer_id!r} has {width} features, too few for {count} seeds",
            f"set seeds.seeds_per_layer to at most {width}",
        )
    cost = price(
        width,
        count,
        config.seeds.chunk_sizes,
        blueprint(seeds.blueprint),
        seeds.hidden,
        module.inputs,
    )
    return LayerPlan(
        layer_id=module.layer_id,
        stage=factories[module.stage].name,
        kind=module.kind,
        width=width,
        seeds=count,
        chunk=cost.chunk,
        host_parameters=module.parameters,
        seed_parameters=cost.parameters,
        bytes=cost.bytes,
    )


def _coordinator_spec(
    config: RunConfig, stages: int, layers: Sequence[LayerPlan]
) -> CoordinatorSpec:
    identity = config.identity()
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return CoordinatorSpec(
        stages=stages,
        epochs=config.train.epochs,
        batch_size=config.data.batch_size,
        every_epochs=config.storage.every_epochs,
        upload_errors_pass=config.storage.on_upload_error == "warn",
        timeout_s=config.cluster.step_timeout_s,
        policy=policy_settings(config.seeds, config.lifecycle),
        manager=lifecycle_manager(config.lifecycle),
        grafting=grafting_settings(config.seeds),
        factory=config.model.factory,
        manifest={
            "run": config.run,
            "config": identity,
            "config_digest": digest,
            "widths": {layer.layer_id: layer.width for layer in layers},
            "rng": {"kind": "counter", "seed": config.seed},
        },
    )
