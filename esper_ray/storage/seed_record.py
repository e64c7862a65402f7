"""One seed as the seed documents' record, and as a row that a group of checkpoints holds."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper_ray.errors import ConfigError
from esper_ray.storage.layer_rows import KEYS, STATE, WEIGHTS, LayerSchema, Rows, TableSchema

RECORD_VERSION: Final = 3

Values = Mapping[str, int | float | NDArray[Any]]


class SeedRow:
    """A checked row: the table parts that the seed has, and its tensors if it has any."""

    __slots__ = ("tables", "tensors")

    def __init__(
        self,
        schema: LayerSchema,
        state_data: Mapping[str, Any],
        blueprint_state: Mapping[str, Tensor] | None,
    ) -> None:
        """ConfigError, a ValueError, naming what is not of the schema."""
        given = dict(state_data)
        self.tables: dict[str, Values] = {}
        for part in schema.tables.keys() - {STATE}:
            values = given.pop(part, None)
            if values is not None:
                self.tables[part] = _values(part, values, schema.tables[part], None)
        self.tables[STATE] = _values(STATE, given, schema.tables[STATE], schema.born)
        self.tensors = None if blueprint_state is None else _tensors(schema, blueprint_state)


def _values(
    part: str, given: object, table: TableSchema, born: Mapping[str, int] | None
) -> dict[str, int | float | NDArray[Any]]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{part!r} of a checkpoint is {given!r}", "give a mapping by column")
    if unknown := sorted(map(str, given.keys() - table.keys())):
        raise ConfigError(
            f"a checkpoint of this layer has no column {unknown[0]!r}",
            f"its columns are {', '.join(table)}",
        )
    if born is None and len(given) < len(table):
        raise ConfigError(f"{part!r} of a checkpoint lacks {sorted(table.keys() - given.keys())}")
    found: dict[str, int | float | NDArray[Any]] = {}
    for name, (kind, width) in table.items():
        if name in given:
            found[name] = _value(name, given[name], kind, width)
        else:
            found[name] = (born or {}).get(name, 0)
    return found


def _value(name: str, value: Any, kind: np.dtype[Any], width: int) -> int | float | NDArray[Any]:
    try:
        if not width and kind.kind == "f":
            return float(value)
        array = np.asarray(value) if width else np.asarray(operator.index(value))
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ConfigError(f"column {name!r} cannot hold {value!r}: {error}") from error
    if array.size != (width or 1):
        raise ConfigError(f"column {name!r} holds {width or 1} values, not {array.size}")
    if kind.kind != "f":
        limits = np.iinfo(kind)
        if array.dtype.kind not in "iub" or array.min() < limits.min or array.max() > limits.max:
            raise ConfigError(f"column {name!r} of {kind} cannot hold {value!r}")
    elif array.dtype.kind not in "iubf":
        raise ConfigError(f"column {name!r} of {kind} cannot hold {value!r}")
    return array.reshape(-1) if width else int(array)


def _tensors(schema: LayerSchema, given: Mapping[str, object]) -> Mapping[str, Tensor]:
    wanted = schema.tensors.get(WEIGHTS, {})
    if given.keys() != wanted.keys():
        raise ConfigError(
            f"a blueprint of this layer has the tensors {sorted(wanted)}, not {sorted(given)}",
            "pass the seed's own weights and optimiser rows, all of them",
        )
    found: dict[str, Tensor] = {}
    for name, (kind, shape) in wanted.items():
        tensor = given[name]
        if not isinstance(tensor, Tensor) or tensor.dtype != kind or tensor.shape != shape:
            form = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else tensor
            raise ConfigError(f"tensor {name!r} of a checkpoint is {form}, not {kind} {shape}")
        found[name] = tensor.detach()
    return found


def to_record(rows: Rows, schema: LayerSchema, device: torch.device | str) -> dict[str, Any]:
    """`state_data` and `blueprint_state` of rows that hold one seed, tensors on a device."""
    state_data = _plain(rows.tables[STATE])
    for part in schema.tables.keys() - {STATE}:
        table = rows.tables[part]
        state_data[part] = _plain(table) if len(table["seed_id"]) else None
    weights = rows.tensors.get(WEIGHTS)
    blueprint_state = None
    if weights is not None and len(weights["seed_id"]):
        blueprint_state = {n: v[0].to(device) for n, v in weights.items() if n not in KEYS}
    return {"state_data": state_data, "blueprint_state": blueprint_state}


def _plain(table: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    return {name: value[0].tolist() for name, value in table.items() if name not in KEYS}
