"""What a layer's log keeps of seeds: rows of tables and tensors, and which of them are newest."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper_ray.errors import CorruptError

Columns = dict[str, NDArray[Any]]
Tensors = dict[str, Tensor]
TableSchema = Mapping[str, tuple[np.dtype[Any], int]]
TensorSchema = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

STATE: Final = "state"
WEIGHTS: Final = "weights"
KEYS: Final = ("seed_id", "event_no")
KEY_TABLE: Final[TableSchema] = {name: (np.dtype(np.int32), 0) for name in KEYS}

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_DTYPES: Final = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    )
}
_COLUMN_TYPES: Final = ("int8", "int16", "int32", "int64", "uint8", "float32", "float64")
_MAX_NAMES, _MAX_ROW_VALUES = 1024, 2**31


@dataclass(frozen=True, slots=True)
class LayerSchema:
    """Names, types and shapes of one row, by part; the table "state" holds every seed.

    Tables: column -> (dtype, width), width 0 for a plain column. Tensors: name -> (dtype, shape of
    one row). `born` is what a column of "state" holds where a checkpoint does not say, else 0.
    ValueError where "state" is missing or a name cannot be stored.
    """

    tables: Mapping[str, TableSchema]
    tensors: Mapping[str, TensorSchema] = field(default_factory=dict)
    born: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if STATE not in self.tables or self.tables.keys() & self.tensors.keys():
            raise ValueError("a schema needs the table 'state', and no two parts of one name")
        parts = {**self.tables, **self.tensors}
        for name in [*parts, *(column for part in parts.values() for column in part)]:
            if not _NAME.fullmatch(name) or name in KEYS:
                raise ValueError(f"{name!r} cannot name a stored part, column or tensor")

    def to_json(self) -> dict[str, Any]:
        """The schema as JSON values; `born`, which matters to writers only, is left out."""
        return {
            "tables": {
                part: [[name, np.dtype(kind).name, width] for name, (kind, width) in table.items()]
                for part, table in self.tables.items()
            },
            "tensors": {
                part: [
                    [name, str(kind).removeprefix("torch."), list(shape)]
                    for name, (kind, shape) in tensors.items()
                ]
                for part, tensors in self.tensors.items()
            },
        }

    @classmethod
    def from_json(cls, value: object) -> LayerSchema:
        """Read a schema that nobody vouches for; CorruptError unless every field is right."""
        try:
            if not isinstance(value, dict) or value.keys() != {"tables", "tensors"}:
                raise ValueError("its parts are not tables and tensors")
            return cls(
                {part: _read_table(table) for part, table in value["tables"].items()},
                {part: _read_tensors(table) for part, table in value["tensors"].items()},
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"a manifest holds a malformed schema: {error}") from error

    @property
    def row_bytes(self) -> int:
        """Bytes of one row with all its parts."""
        return sum(
            np.dtype(kind).itemsize * (width or 1)
            for table in self.tables.values()
            for kind, width in table.values()
        ) + sum(
            kind.itemsize * int(np.prod(shape))
            for table in self.tensors.values()
            for kind, shape in table.values()
        )


def _read_table(value: list[Any]) -> TableSchema:
    table = {}
    for name, kind, width in value:
        if kind not in _COLUMN_TYPES or type(width) is not int or not 0 <= width < _MAX_NAMES:
            raise ValueError(f"column {name!r} is {kind!r} of width {width!r}")
        table[name] = (np.dtype(kind), width)
    if len(value) > _MAX_NAMES or len(table) != len(value):
        raise ValueError(f"a table has {len(value)} columns, or one of them twice")
    return table


def _read_tensors(value: list[Any]) -> TensorSchema:
    tensors = {}
    for name, kind, shape in value:
        if any(type(n) is not int or n < 0 for n in shape) or len(shape) > 8:
            raise ValueError(f"tensor {name!r} has the shape {shape!r}")
        if float(np.prod([float(n) for n in shape])) > _MAX_ROW_VALUES:
            raise ValueError(f"a row of tensor {name!r} has the shape {shape!r}")
        tensors[name] = (_DTYPES[kind], tuple(shape))
    if len(value) > _MAX_NAMES or len(tensors) != len(value):
        raise ValueError(f"a part has {len(value)} tensors, or one of them twice")
    return tensors


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of seeds, by part; each part carries `seed_id` and `event_no`, (rows,) int32.

    A row of another part belongs to the row of "state" with the same two; a seed that has a row in
    "state" and none in a part has nothing there.
    """

    tables: dict[str, Columns]
    tensors: dict[str, Tensors] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.seed_ids)

    @property
    def seed_ids(self) -> NDArray[np.int32]:
        """Seed of every row of "state"."""
        ids: NDArray[np.int32] = self.tables[STATE]["seed_id"]
        return ids

    def keep(self, seed_ids: NDArray[Any]) -> Rows:
        """The rows of these seeds only."""
        return self.take({part: np.isin(keys[0], seed_ids) for part, keys in _keys(self).items()})

    def only(self, event_no: int) -> Rows:
        """The rows of one event only."""
        return self.take({part: keys[1] == event_no for part, keys in _keys(self).items()})

    def take(self, index: Mapping[str, NDArray[Any]]) -> Rows:
        """The rows that a mask or an array of positions names, by part."""
        return Rows(
            {p: {n: v[index[p]] for n, v in table.items()} for p, table in self.tables.items()},
            {p: _pick(tensors, index[p]) for p, tensors in self.tensors.items()},
        )

    def to(self, device: torch.device | str) -> Rows:
        """The same with all tensors but the keys on a device."""
        moved = {
            part: {n: v if n in KEYS else v.to(device) for n, v in tensors.items()}
            for part, tensors in self.tensors.items()
        }
        return Rows(self.tables, moved)

    def renumbered(self, offset: int) -> Rows:
        """The same with `offset` added to every seed id, as a shard numbers its own from 0."""
        return Rows(
            {p: {**t, "seed_id": t["seed_id"] + np.int32(offset)} for p, t in self.tables.items()},
            {p: {**t, "seed_id": t["seed_id"] + offset} for p, t in self.tensors.items()},
        )


def _pick(tensors: Tensors, index: NDArray[Any]) -> Tensors:
    where = torch.from_numpy(np.flatnonzero(index) if index.dtype == np.bool_ else index)
    return {name: value.index_select(0, where.to(value.device)) for name, value in tensors.items()}


def _keys(rows: Rows) -> dict[str, tuple[NDArray[np.int32], NDArray[np.int32]]]:
    found = {part: (t["seed_id"], t["event_no"]) for part, t in rows.tables.items()}
    for part, tensors in rows.tensors.items():
        found[part] = (tensors["seed_id"].numpy(), tensors["event_no"].numpy())
    return found


def check_keys(rows: Rows) -> None:
    """CorruptError where a row comes twice, or a part has a row that "state" has not."""
    keys = {p: _pairs(*pair) for p, pair in _keys(rows).items()}
    known = {*keys[STATE].tolist()}
    for part, pairs in keys.items():
        if len({*pairs.tolist()}) != len(pairs):
            raise CorruptError(f"part {part!r} of a layer's segment holds a row twice")
        if not {*pairs.tolist()} <= known:
            raise CorruptError(f"part {part!r} of a layer's segment has rows without a state")


def _pairs(seed_ids: NDArray[Any], event_nos: NDArray[Any]) -> NDArray[np.int64]:
    return seed_ids.astype(np.int64) << 32 | event_nos.astype(np.int64)


def join(batches: Sequence[Rows]) -> Rows:
    """All rows of all batches, which have the same parts, one after the other."""
    first = batches[0]
    return Rows(
        {
            part: {n: np.concatenate([b.tables[part][n] for b in batches]) for n in table}
            for part, table in first.tables.items()
        },
        {
            part: {n: torch.cat([b.tensors[part][n] for b in batches]) for n in tensors}
            for part, tensors in first.tensors.items()
        },
    )


def newest(batches: Sequence[Rows]) -> Rows:
    """One row per seed, by seed id: that of the last batch, and there of the highest event.

    What the winning batch does not hold of a seed in some part, the seed does not have.
    """
    joined, keys = join(batches), [_keys(batch) for batch in batches]
    stamps = {
        part: np.concatenate(
            [_pairs(np.full(len(k[part][0]), n), k[part][1]) for n, k in enumerate(keys)]
        )
        for part in keys[0]
    }
    ids = _keys(joined)
    order = np.lexsort((stamps[STATE], ids[STATE][0]))
    seeds = ids[STATE][0][order]
    last = order[np.append(seeds[1:] != seeds[:-1], True)] if len(order) else order
    winners, stamp = ids[STATE][0][last], stamps[STATE][last]
    index = {}
    for part, (part_ids, _) in ids.items():
        at = np.searchsorted(winners, part_ids).clip(max=max(len(winners) - 1, 0))
        mine = np.flatnonzero((winners[at] == part_ids) & (stamp[at] == stamps[part]))
        index[part] = mine[np.argsort(part_ids[mine], kind="stable")]
    return joined.take(index)


def in_order(rows: Rows) -> Rows:
    """The same rows by seed id, then by event."""
    return rows.take({part: np.argsort(_pairs(*pair)) for part, pair in _keys(rows).items()})
