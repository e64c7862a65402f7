"""What grafting remembers between epochs: one row per seed in GRAFTING, none for other seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esper_ray.errors import CorruptError

_INT16_MAX: Final = np.iinfo(np.int16).max
_INT32_MAX: Final = np.iinfo(np.int32).max
_FLOAT_MAX: Final = float(np.finfo(np.float64).max)


class _Column(NamedTuple):
    dtype: type[np.generic]
    birth: float = 0
    low: float = 0
    high: float = np.inf
    survives_switch: bool = False
    nullable: bool = False


# Wide columns first: a row is 56 bytes, every field aligned.
_DECLARED: Final[Mapping[str, _Column]] = {
    "velocity": _Column(np.float64, low=-_FLOAT_MAX, high=_FLOAT_MAX),
    "last": _Column(np.float64, high=1.0),
    "performance_delta": _Column(
        np.float64, birth=np.nan, low=-np.inf, survives_switch=True, nullable=True
    ),
    "loss_variance": _Column(np.float64, birth=np.nan, survives_switch=True, nullable=True),
    "accuracy_variance": _Column(np.float64, birth=np.nan, survives_switch=True, nullable=True),
    "seed_id": _Column(np.int32, survives_switch=True),
    "pause": _Column(np.int16),
    "paused": _Column(np.int16),
    "ramp": _Column(np.int16),
    # Born as if the last switch were long ago, so that the first one need not wait.
    "since_switch": _Column(np.int16, birth=_INT16_MAX, survives_switch=True),
    "bad": _Column(np.uint8),
    "improving": _Column(np.uint8, survives_switch=True),
    "limited": _Column(np.bool_, survives_switch=True),
}

COLUMNS: Final[Mapping[str, np.dtype[Any]]] = {
    name: np.dtype(column.dtype) for name, column in _DECLARED.items()
}
"""Every column by name; the keys of `GraftingMemory.arrays()`."""

BIRTH: Final[Mapping[str, float]] = {name: column.birth for name, column in _DECLARED.items()}
"""The value of every column in a row that has just entered."""

_RESTORE: Final = "restore an older checkpoint"
_ROW: Final = np.dtype(list(COLUMNS.items()), align=True)
_NEWBORN: Final = np.array(tuple(BIRTH.values()), _ROW)


class GraftingMemory:
    """A table of rows ordered by seed id; `memory[column]` is a writable view on a column.

    Entering and leaving cost what the rows do: new rows wait at the end, and the order is made
    when somebody next looks. Views are valid until then.
    """

    BYTES_PER_ROW: Final = _ROW.itemsize

    __slots__ = ("_ordered", "_rows", "_table")

    def __init__(self) -> None:
        self._table: NDArray[np.void] = np.empty(0, _ROW)  # with room to grow
        self._rows: dict[int, int] = {}
        self._ordered = True

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, column: str) -> NDArray[Any]:
        return self._live()[column]

    @property
    def seed_ids(self) -> NDArray[np.int32]:
        """Ids of the seeds that have a row, ascending."""
        return self["seed_id"]

    def _live(self) -> NDArray[np.void]:
        live = self._table[: len(self)]
        if not self._ordered:
            live[:] = live[np.argsort(live["seed_id"], kind="stable")]
            self._rows = dict(zip(live["seed_id"].tolist(), range(len(live)), strict=True))
            self._ordered = True
        return live

    def enter(self, ids: NDArray[np.int64]) -> None:
        """Give each seed a fresh row; a seed that has one loses what it remembered."""
        if len(ids) == 0:
            return
        fresh = list(dict.fromkeys(ids.tolist()))
        self.leave(ids)
        used, needed = len(self), len(self) + len(fresh)
        if needed > len(self._table):
            grown = np.empty(max(needed, 2 * used), _ROW)
            grown[:used] = self._table[:used]
            self._table = grown
        self._table[used:needed] = _NEWBORN
        own = self._table["seed_id"][:needed]
        own[used:] = fresh
        self._rows.update(zip(fresh, range(used, needed), strict=True))
        start = max(used - 1, 0)
        ascending = np.count_nonzero(own[start + 1 :] > own[start:-1]) == needed - start - 1
        self._ordered = (self._ordered or used == 0) and ascending

    def leave(self, ids: NDArray[np.int64]) -> None:
        """Forget these seeds; those without a row are ignored."""
        if not self._rows:
            return
        found = [self._rows.pop(seed, None) for seed in ids.tolist()]
        holes = {row for row in found if row is not None}
        left = len(self)
        if left == 0 or not holes:
            return
        tail = [row for row in range(left, left + len(holes)) if row not in holes]
        filled = [row for row in holes if row < left]  # as many as there are rows in the tail
        self._table[filled] = self._table[tail]
        self._rows.update(zip(self._table["seed_id"][filled].tolist(), filled, strict=True))
        self._ordered = False

    def positions(self, ids: NDArray[np.int64]) -> NDArray[np.intp]:
        """Row number of each seed; KeyError names the seeds that have none."""
        rows = self._find(ids)
        if (rows < 0).any():
            raise KeyError(f"seeds without a grafting row: {ids[rows < 0].tolist()}")
        return rows

    def _find(self, ids: NDArray[np.int64]) -> NDArray[np.intp]:
        """Row number of each seed, -1 for those that have none."""
        self._live()
        return np.array([self._rows.get(seed, -1) for seed in ids.tolist()], np.intp)

    def measured(self, ids: NDArray[np.int64], delta: NDArray[np.floating[Any]]) -> None:
        """Keep the performance delta of those of the seeds that have a row."""
        rows = self._find(ids)
        self["performance_delta"][rows[rows >= 0]] = delta[rows >= 0]

    def observed(self, loss_variance: float, accuracy_variance: float) -> None:
        """Keep the variances of the last gate losses and accuracies, for all rows."""
        self["loss_variance"][:], self["accuracy_variance"][:] = loss_variance, accuracy_variance

    def begin_strategy(self, rows: NDArray[np.bool_]) -> None:
        """Give the rows where `rows` is True fresh strategy columns, for a strategy begun late."""
        for name, column in _DECLARED.items():
            if not column.survives_switch:
                self[name][rows] = column.birth

    def require_rows(self, ids: NDArray[np.int64]) -> None:
        """ValueError unless `ids` are the seeds of this table, in its order."""
        if not np.array_equal(ids, self.seed_ids):
            raise ValueError(
                f"signals of {len(ids)} seeds do not match the {len(self)} seeds in grafting"
            )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """A copy of every column, for storage."""
        return {name: self[name].copy() for name in COLUMNS}

    def to_bytes(self) -> NDArray[np.uint8]:
        """Every column, one after another."""
        return np.concatenate([column.view(np.uint8) for column in self.arrays().values()])

    def from_bytes(self, data: NDArray[np.uint8]) -> None:
        """Become the table that `to_bytes` described; CorruptError leaves this one as it was."""
        rows, rest = divmod(len(data), sum(dtype.itemsize for dtype in COLUMNS.values()))
        if rest:
            raise CorruptError(f"{len(data)} bytes are no grafting table", _RESTORE)
        arrays, start = {}, 0
        for name, dtype in COLUMNS.items():
            arrays[name] = data[start : start + rows * dtype.itemsize].copy().view(dtype)
            start += rows * dtype.itemsize
        self.load(arrays)

    def load(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Become the table that `arrays()` described; CorruptError leaves this one as it was."""
        _check_shapes(arrays)
        for name, column in _DECLARED.items():
            _check_values(name, column, arrays[name])
        if (np.diff(arrays["seed_id"]) <= 0).any():
            raise CorruptError("seed_id of the grafting table must ascend", _RESTORE)
        table = np.empty(len(arrays["seed_id"]), _ROW)
        for name in COLUMNS:
            table[name] = arrays[name]
        self._table, self._ordered = table, True
        self._rows = dict(zip(table["seed_id"].tolist(), range(len(table)), strict=True))


def _check_shapes(arrays: Mapping[str, NDArray[Any]]) -> None:
    if set(arrays) != set(COLUMNS):
        found = ", ".join(sorted(set(arrays) ^ set(COLUMNS)))
        raise CorruptError(f"the grafting table lacks, or should not have: {found}", _RESTORE)
    shape = (arrays["seed_id"].size,)
    for name, dtype in COLUMNS.items():
        found_dtype, found_shape = arrays[name].dtype, arrays[name].shape
        if found_dtype != dtype or found_shape != shape:
            raise CorruptError(
                f"{name} of the grafting table must be {dtype} {shape}, "
                f"got {found_dtype} {found_shape}",
                _RESTORE,
            )


def _check_values(name: str, column: _Column, values: NDArray[Any]) -> None:
    fine = (values >= column.low) & (values <= column.high)
    if column.nullable:
        fine |= np.isnan(values)
    if not fine.all():
        raise CorruptError(
            f"{name} of the grafting table must be in {column.low}..{column.high}, "
            f"got {values[~fine][0]}",
            _RESTORE,
        )
