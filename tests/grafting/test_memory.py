"""The compact table: rows come and go, stay in order, and survive storage."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_ray.errors import CorruptError
from esper_ray.grafting import BIRTH, COLUMNS, GraftingMemory


def ids(*numbers: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(numbers, np.int64)


def table(*numbers: int) -> GraftingMemory:
    memory = GraftingMemory()
    memory.enter(ids(*numbers))
    return memory


def same(one: GraftingMemory, other: GraftingMemory) -> bool:
    pairs = zip(one.arrays().values(), other.arrays().values(), strict=True)
    return all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in pairs)


def test_a_row_is_born_with_the_declared_values() -> None:
    memory = table(7)
    for name, dtype in COLUMNS.items():
        born = 7 if name == "seed_id" else BIRTH[name]
        assert memory[name].dtype == dtype
        assert np.array_equal(memory[name], np.array([born], dtype), equal_nan=dtype.kind == "f")


def test_a_row_takes_fifty_six_bytes() -> None:
    assert GraftingMemory.BYTES_PER_ROW == 56


def test_rows_stay_in_order_of_seed_ids() -> None:
    memory = table(5, 1)
    memory.enter(ids(9, 3))
    assert memory.seed_ids.tolist() == [1, 3, 5, 9]
    memory.leave(ids(3, 4))
    assert memory.seed_ids.tolist() == [1, 5, 9]
    assert memory.positions(ids(9, 1)).tolist() == [2, 0]
    assert len(memory) == 3


def test_entering_twice_renews_only_that_row() -> None:
    memory = table(1, 2)
    memory["pause"][:] = 4
    memory.enter(ids(2, 2))
    assert memory["pause"].tolist() == [4, 0]


def test_leaving_and_entering_anew_forgets_everything() -> None:
    memory = table(1, 2)
    for name in COLUMNS.keys() - {"seed_id"}:
        memory[name][:] = 1
    memory.leave(ids(1, 2))
    assert len(memory) == 0
    memory.enter(ids(1, 2))
    assert same(memory, table(1, 2))


def test_leaving_an_empty_table_changes_nothing() -> None:
    memory = GraftingMemory()
    memory.leave(ids(1))
    memory.measured(ids(1), np.array([0.5]))
    assert len(memory) == 0


def test_the_position_of_an_absent_seed_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"\[4\]"):
        table(1, 5).positions(ids(1, 4))


def test_measured_keeps_the_delta_of_seeds_in_the_table() -> None:
    memory = table(1, 5)
    memory.measured(ids(9, 5, 0), np.array([0.9, 0.25, 0.1], np.float32))
    assert np.array_equal(memory["performance_delta"], [np.nan, 0.25], equal_nan=True)


def test_arrays_are_copies() -> None:
    memory = table(1)
    memory.arrays()["pause"][:] = 9
    assert memory["pause"].tolist() == [0]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda memory: pickle.loads(pickle.dumps(memory))]
)
def test_a_copy_is_equal(copied: Any) -> None:
    memory = table(1, 2)
    memory["last"][:] = [0.25, 0.5]
    assert same(copied(memory), memory)


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.tuples(st.booleans(), st.sets(st.integers(0, 12), max_size=6)), max_size=8)
)
def test_the_table_is_the_set_of_entered_seeds(steps: list[tuple[bool, set[int]]]) -> None:
    memory, expected = GraftingMemory(), set[int]()
    for enters, seeds in steps:
        (memory.enter if enters else memory.leave)(ids(*seeds))
        expected = expected | seeds if enters else expected - seeds
    assert memory.seed_ids.tolist() == sorted(expected)
    loaded = GraftingMemory()
    loaded.load(memory.arrays())
    assert same(loaded, memory)


def spoiled(name: str, value: Any) -> dict[str, Any]:
    return table(1, 2).arrays() | {name: value}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"seed_id": ids(1)}, "lacks, or should not have: .*pause"),
        (spoiled("extra", ids(1, 2)), "lacks, or should not have: extra"),
        (spoiled("pause", np.zeros(3, np.int16)), r"pause .* must be int16 \(2,\), got .*\(3,\)"),
        (spoiled("pause", np.zeros((2, 1), np.int16)), r"pause .* got int16 \(2, 1\)"),
        (spoiled("pause", np.zeros(2, np.int32)), "pause .* got int32"),
        (spoiled("seed_id", np.array([2, 1], np.int32)), "seed_id .* must ascend"),
        (spoiled("seed_id", np.array([1, 1], np.int32)), "seed_id .* must ascend"),
        (spoiled("seed_id", np.array([-1, 1], np.int32)), "seed_id .* got -1"),
        (spoiled("pause", np.array([0, -3], np.int16)), "pause .* must be in 0.* got -3"),
        (spoiled("ramp", np.array([0, -3], np.int16)), "ramp .* got -3"),
        (spoiled("velocity", np.array([0, np.nan])), "velocity .* got nan"),
        (spoiled("velocity", np.array([np.inf, 0])), "velocity .* got inf"),
        (spoiled("last", np.array([1.5, 0])), r"last .* got 1\.5"),
    ],
)
def test_a_corrupt_table_is_refused_and_nothing_changes(
    arrays: dict[str, Any], message: str
) -> None:
    memory = table(8)
    with pytest.raises(CorruptError, match=message):
        memory.load(arrays)
    assert same(memory, table(8))
