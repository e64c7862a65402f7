"""What there is to draw: the plan of a run file, or the state that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esper_ray.actors.persistence import layer_ids, read_checked_state
from esper_ray.config import RunConfig
from esper_ray.errors import ConfigError, CorruptError
from esper_ray.growth.snapshot import state_columns
from esper_ray.growth.spec import LayerSpec
from esper_ray.picture.rows import Layer, Picture, chunk_rows
from esper_ray.planning import plan_run
from esper_ray.seeds import ExtendedStateTensor
from esper_ray.seeds.chunks import chunk_bounds
from esper_ray.storage import RunCheckpoints, RunLog, SegmentRef, manifest


def of_plan(config: RunConfig) -> Picture:
    """The chunks that a run would begin with, every seed DORMANT; nothing is trained."""
    limit = config.lifecycle.error_limit
    layers = [layer for stage in plan_run(config).stages for layer in stage.layers]
    return Picture(f"run {config.run}", "plan", tuple(_planned(layer, limit) for layer in layers))


def _planned(layer: LayerSpec, error_limit: int) -> Layer:
    bounds = chunk_bounds(layer.width, layer.num_seeds, layer.chunk_sizes)
    unborn = state_columns(ExtendedStateTensor(layer.num_seeds))
    return Layer(layer.layer_id, layer.width, chunk_rows(unborn, bounds, error_limit))


def of_checkpoint(log: RunLog, selector: str) -> Picture:
    """The chunks of one commit, all that it names checked; no model is built.

    ConfigError for a commit of a version that did not store the widths of layers.
    """
    commits = RunCheckpoints(log)
    body = commits.load(commits.resolve(selector))
    segments = {ref.name: ref for ref in manifest.segments(body)}
    where = f"{log.root.url}@step={body.get('step')}"
    layers = tuple(_stored(log, segments, name, body, where) for name in layer_ids(segments))
    title = f"run {body.get('run')}, step {body.get('step')}, epoch {body.get('epoch')}"
    return Picture(title, where, layers)


def _stored(
    log: RunLog,
    segments: Mapping[str, SegmentRef],
    layer_id: str,
    body: Mapping[str, Any],
    where: str,
) -> Layer:
    columns = read_checked_state(log, segments, layer_id)
    limit = _setting(body, "lifecycle.error_limit", where)
    if type(limit) is not int:
        raise CorruptError(f"{where} has an error limit {limit!r}, which is no number")
    width = _width(body, layer_id, where)
    bounds = _bounds(width, len(columns["seed_id"]), _sizes(body, where), f"{where}, {layer_id}")
    return Layer(layer_id, width, chunk_rows(columns, bounds, limit))


def _width(body: Mapping[str, Any], layer_id: str, where: str) -> int:
    if "widths" not in body:
        raise ConfigError(
            f"{where} does not say how wide its layers are",
            "it is of an older version: train on with this one, or draw the plan of its run file",
        )
    widths = body["widths"]
    width = widths.get(layer_id) if isinstance(widths, dict) else None
    if type(width) is not int or not 0 < width < 2**31:
        raise CorruptError(f"{where} has no width of layer {layer_id!r} that could be one")
    return width


def _sizes(body: Mapping[str, Any], where: str) -> Sequence[int] | None:
    sizes = _setting(body, "seeds.chunk_sizes", where)
    if sizes is None:
        return None
    if not isinstance(sizes, list) or not all(type(size) is int for size in sizes):
        raise CorruptError(f"{where} has chunk sizes that are no list of numbers")
    return sizes


def _setting(body: Mapping[str, Any], key: str, where: str) -> object:
    config = body.get("config")
    if not isinstance(config, dict) or key not in config:
        raise CorruptError(f"{where} does not hold the setting {key}")
    found: object = config[key]
    return found


def _bounds(width: int, seeds: int, sizes: Sequence[int] | None, where: str) -> NDArray[np.int64]:
    try:
        return chunk_bounds(width, seeds, sizes)
    except ConfigError as error:
        raise CorruptError(f"{where}: {error}") from error
