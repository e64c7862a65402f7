"""Putting seeds on a model, saying beforehand what that costs, and taking them off again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from esper_ray.blueprints import blueprint
from esper_ray.errors import ConfigError
from esper_ray.layers import LayerSeeds, attach_seeds, detach_seeds
from esper_ray.layers.hook import CHILD
from esper_ray.seeds.price import price
from esper_ray.session.config import SeedConfig
from esper_ray.session.sites import Site, find_sites, host_device
from esper_ray.session.tables import PlannedLayer, SeedPlan


def plan(model: nn.Module, config: SeedConfig, sample: Any = None) -> SeedPlan:
    """What `attach` would do, layer by layer; touches nothing.

    NoMatch where an entry of `targets` or `exclude` matches no module.
    """
    sites = find_sites(model, config, sample)
    return SeedPlan(tuple(_planned(model, site, config) for site in sites))


def _planned(model: nn.Module, site: Site, config: SeedConfig) -> PlannedLayer:
    _check(site, config)
    cost = price(
        site.width,
        config.seeds_per_layer,
        config.chunk_sizes,
        blueprint(site.blueprint),
        config.hidden,
        site.inputs,
    )
    return PlannedLayer(
        layer=site.layer_id,
        kind=site.kind,
        width=site.width,
        seeds=config.seeds_per_layer,
        chunk=cost.chunk,
        blueprint=site.blueprint,
        host_parameters=_weights(model.get_submodule(site.layer_id)),
        seed_parameters=cost.parameters,
        bytes=cost.bytes,
    )


def _check(site: Site, config: SeedConfig) -> None:
    config.growing(site.blueprint)
    if config.seeds_per_layer > site.width:
        raise ConfigError(
            f"layer {site.layer_id!r} has {site.width} features, too few for "
            f"{config.seeds_per_layer} seeds",
            f"set seeds_per_layer to at most {site.width}, or exclude the layer",
        )


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def place(model: nn.Module, sites: Sequence[Site], config: SeedConfig) -> dict[str, LayerSeeds]:
    """Give each site its seeds, all of them or none; by layer id."""
    if carried := seeded(model):
        raise ConfigError(
            f"layer {next(iter(carried))!r} carries seeds already",
            "detach the model before attaching seeds again",
        )
    made = {site.layer_id: _make(model, site, config) for site in sites}
    for site in sites:
        attach_seeds(model.get_submodule(site.layer_id), made[site.layer_id], site.output)
    return made


def _make(model: nn.Module, site: Site, config: SeedConfig) -> LayerSeeds:
    _check(site, config)
    host = model.get_submodule(site.layer_id)
    seeds = LayerSeeds(
        site.width,
        config.seeds_per_layer,
        site.layer_id,
        inputs=site.inputs,
        blueprint_name=site.blueprint,
        hidden=config.hidden,
        stream=str(config.seed),
        chunk_sizes=config.chunk_sizes,
        host_weights=_weights(host),
    )
    return seeds.to(host_device(host)).train(host.training)


def seeded(model: nn.Module) -> dict[str, LayerSeeds]:
    """The seeds that a model carries, by the names of their hosts."""
    found = {}
    for name, module in model.named_modules():
        seeds = getattr(module, CHILD, None)
        if isinstance(seeds, LayerSeeds):
            found[name] = seeds
    return found


def detach(model: nn.Module, discard: bool = False) -> None:
    """Take all seeds and their hooks off; the host is as it was trained.

    ConfigError where a seed is part of the output, that is alpha above 0, unless `discard`.
    """
    carried = seeded(model)
    if not carried:
        raise ConfigError("the model carries no seeds", "attach some first")
    blended = [name for name, seeds in carried.items() if (seeds.state.view().alpha > 0).any()]
    if blended and not discard:
        raise ConfigError(
            f"seeds of layer {blended[0]!r} are part of the model's output",
            "export the model to keep them, or pass discard=True to lose them",
        )
    for name in carried:
        detach_seeds(model.get_submodule(name))
