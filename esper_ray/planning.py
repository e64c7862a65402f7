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
from esper_ray.actors.event_hub import EventSettings
from esper_ray.actors.grid import Grid
from esper_ray.actors.herald import HeraldSpec
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
    whole: str = ""
    """Why it cannot be split over several actors, if it cannot."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Everything a run starts from."""

    stages: tuple[StageSpec, ...]
    layers: tuple[LayerPlan, ...]
    grid: Grid
    transport: str
    """`torch_dist` or `object_store`."""
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
            device="cuda" if config.cluster.gpus else "cpu",
            dtype=config.train.precision,
            recompute=config.cluster.recompute,
        )
        for index, factory in enumerate(factories)
    )
    grid = _grid(config, len(stages), matched)
    return RunPlan(
        stages=stages,
        layers=layers,
        grid=grid,
        transport=_transport(config.cluster.transport, grid),
        coordinator=_coordinator_spec(config, grid.world, layers),
        card=dataset.card,
    )


def _grid(config: RunConfig, stages: int, matched: Sequence[ModuleInfo]) -> Grid:
    """Actors of each stage: it is split where every layer of it that carries seeds can be."""
    cluster = config.cluster
    shards = cluster.shards or max(1, cluster.gpus // stages)
    if cluster.shards and cluster.shards > config.seeds.seeds_per_layer:
        raise ConfigError(
            f"cluster.shards {shards} is more than seeds.seeds_per_layer",
            f"set it to at most {config.seeds.seeds_per_layer}",
        )
    shards = min(shards, config.seeds.seeds_per_layer)
    whole = {module.stage for module in matched if module.why_whole}
    seeded = {module.stage for module in matched} - whole
    grid = Grid(tuple(shards if index in seeded else 1 for index in range(stages)))
    if cluster.gpus and cluster.gpus < grid.world:
        raise ConfigError(
            f"cluster.gpus {cluster.gpus} is too few for {grid.world} actors",
            "give each actor a GPU, lower cluster.shards, or set cluster.gpus to 0",
        )
    return grid


def _transport(asked: str, grid: Grid) -> str:
    if asked != "auto":
        return asked
    return "torch_dist" if grid.world > 1 else "object_store"


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
        width=module.width,
        num_seeds=config.seeds.seeds_per_layer,
        chunk_sizes=tuple(sizes) if sizes else None,
        inputs=module.inputs,
        feature_dim=module.feature_dim,
    )


def _layer_plan(
    config: RunConfig, seeds: SeedSpec, factories: list[StageFactory], module: ModuleInfo
) -> LayerPlan:
    count, width = config.seeds.seeds_per_layer, module.width
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
        whole=module.why_whole,
    )


def _coordinator_spec(
    config: RunConfig, actors: int, layers: Sequence[LayerPlan]
) -> CoordinatorSpec:
    identity = config.identity()
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return CoordinatorSpec(
        actors=actors,
        epochs=config.train.epochs,
        batch_size=config.data.batch_size,
        every_epochs=config.storage.every_epochs,
        upload_errors_pass=config.storage.on_upload_error == "warn",
        divergence=config.train.divergence,
        timeout_s=config.cluster.step_timeout_s,
        policy=policy_settings(config.seeds, config.lifecycle),
        manager=lifecycle_manager(config.lifecycle),
        grafting=grafting_settings(config.seeds),
        factory=config.model.factory,
        herald=HeraldSpec(EventSettings(config.events.url, config.run)),
        manifest={
            "run": config.run,
            "config": identity,
            "config_digest": digest,
            "widths": {layer.layer_id: layer.width for layer in layers},
            "rng": {"kind": "counter", "seed": config.seed},
        },
    )
