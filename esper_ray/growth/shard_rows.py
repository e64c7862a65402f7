"""Stored rows of a layer and of its host, taken apart for shards and put together again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from esper_ray.errors import CorruptError
from esper_ray.growth.shard import LayerPart
from esper_ray.growth.snapshot import Columns, Tensors, below
from esper_ray.growth.spec import StageSpec

Rows = TypeVar("Rows", Columns, Tensors)


def renumbered(rows: Rows, first: int) -> Rows:
    """The same rows with seed ids of the whole layer, where seed 0 is its seed `first`."""
    return {**rows, "seed_id": rows["seed_id"] + first}


def rows_between(rows: Rows, first: int, seeds: int) -> Rows:
    """Rows of seeds `first` to `first` + `seeds` - 1, by numbers of their own."""
    ids = rows["seed_id"]
    mine: Any = (ids >= first) & (ids < first + seeds)
    return renumbered({name: values[mine] for name, values in rows.items()}, -first)


def joined_columns(parts: Sequence[Columns]) -> Columns:
    """Tables one after the other."""
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def joined_tensors(parts: Sequence[Tensors]) -> Tensors:
    """Tensors of all shards in order, rows together; a scalar, such as a count, is that of all.

    CorruptError where they are not parts of the same.
    """
    if len(parts) == 1:
        return parts[0]
    if any(part.keys() != parts[0].keys() for part in parts):
        raise CorruptError("the parts of shards hold different tensors")
    found = {}
    for name, one in parts[0].items():
        same = [part[name] for part in parts]
        if any(p.dtype != one.dtype or p.shape[1:] != one.shape[1:] for p in same):
            raise CorruptError(f"the parts of {name} do not fit together")
        found[name] = torch.cat(same) if one.ndim else one
    return found


def split_tensors(spec: StageSpec, tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Of a stage's host: what is a shard's own, and what all of its shards hold."""
    own: Tensors = {}
    if spec.shard.count > 1:
        for layer in spec.layers:
            own |= below(layer.path, tensors)
    return own, {name: value for name, value in tensors.items() if name not in own}


def rows_of_shard(spec: StageSpec, tensors: Tensors) -> Tensors:
    """The tensors of a stage's whole host, cut to what a shard holds of them."""
    if spec.shard.count == 1:
        return tensors
    found = dict(tensors)
    for layer in spec.layers:
        part = LayerPart.of(layer.width, layer.num_seeds, layer.chunk_sizes, spec.shard)
        for name, value in below(layer.path, tensors).items():
            if value.ndim and len(value) != layer.width:
                raise CorruptError(f"host tensor {name} is {tuple(value.shape)} in storage")
            if value.ndim:
                found[name] = value[part.rows].clone()
    return found
