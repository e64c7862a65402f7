"""Stacked weights: born from their key alone, parked and brought back exactly, row by row."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esper_ray.blueprints import BlueprintShape, blueprint, blueprint_names
from esper_ray.seeds import SeedBank
from tests.builders import same_bits

SEEDS = 5
Rows = dict[str, Tensor]


def bank(name: str = "autoencoder") -> SeedBank:
    return SeedBank(blueprint(name), BlueprintShape(4, 3, 2), SEEDS)


def born(rows: list[int], generation: int = 0, stream: str = "0/seed/a") -> SeedBank:
    made = bank()
    made.reset(torch.tensor(rows), torch.full((len(rows),), generation).short(), stream)
    return made


def scrambled(made: SeedBank) -> SeedBank:
    """Every number of every row its own."""
    generator = torch.Generator().manual_seed(1)
    for value in made.tensors().values():
        noise = torch.randn(value.shape, generator=generator) * 100
        value.copy_(noise.to(value.dtype))
    return made


def test_an_input_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="the host read 3 features, but the seeds read 2"):
        bank("input_mlp").read(torch.zeros(2, 3))


def snapshot(made: SeedBank) -> Rows:
    return {name: value.clone() for name, value in made.tensors().items()}


def same_rows(one: Rows, other: Rows, rows: list[int]) -> bool:
    return all(same_bits(one[name][rows], other[name][rows]) for name in one)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.integers(0, SEEDS - 1), unique=True, min_size=1))
def test_newborn_weights_do_not_depend_on_who_else_is_born(rows: list[int]) -> None:
    together, everyone = born(rows).tensors(), born(list(range(SEEDS))).tensors()
    assert same_rows(together, everyone, rows)
    for row in rows:
        assert same_rows(born([row]).tensors(), together, [row])


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(SEEDS)))
def test_newborn_weights_do_not_depend_on_order(order: list[int]) -> None:
    assert same_rows(born(order).tensors(), born(sorted(order)).tensors(), order)


def test_newborn_weights_differ_by_seed_generation_and_stream() -> None:
    weights = [
        born([0, 1]).weights["w_in"][0],
        born([0, 1]).weights["w_in"][1],
        born([0], generation=1).weights["w_in"][0],
        born([0], stream="0/seed/b").weights["w_in"][0],
        born([0], stream="1/seed/a").weights["w_in"][0],
    ]
    assert len({tuple(w.flatten().tolist()) for w in weights}) == len(weights)


def test_two_weights_of_one_seed_differ() -> None:
    made = SeedBank(blueprint("autoencoder"), BlueprintShape(4, 4), 1)
    made.reset(torch.tensor([0]), torch.zeros(1, dtype=torch.int16), "s")
    assert not torch.equal(made.weights["w_in"] / 0.5, made.weights["w_out"] / 0.5)


def test_newborn_weights_fill_their_bound() -> None:
    kind, shape = blueprint("autoencoder"), BlueprintShape(16, 64)
    made = SeedBank(kind, shape, 20)
    made.reset(torch.arange(20), torch.zeros(20, dtype=torch.int16), "s")
    for name, spec in kind.weights(shape).items():
        largest = made.weights[name].abs().max().item()
        assert 0.99 * spec.bound <= largest <= spec.bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_newborn_weights_are_the_same_numbers_in_every_dtype(dtype: torch.dtype) -> None:
    made = bank().to(dtype)
    made.reset(torch.arange(SEEDS), torch.zeros(SEEDS, dtype=torch.int16), "0/seed/a")
    expected = born(list(range(SEEDS)))
    for name, weight in made.weights.items():
        assert weight.dtype == dtype
        assert same_bits(weight, expected.weights[name].to(dtype))


def test_lesson_25_a_reset_row_keeps_no_optimiser_state() -> None:
    made = scrambled(bank())
    made.reset(torch.tensor([2]), torch.zeros(1, dtype=torch.int16), "0/seed/a")
    assert same_rows(made.tensors(), born([2]).tensors(), [2])
    assert made.step_count[2] == 0


def test_reset_leaves_other_rows_alone() -> None:
    made = scrambled(bank())
    before = snapshot(made)
    made.reset(torch.tensor([1, 3]), torch.zeros(2, dtype=torch.int16), "s")
    assert same_rows(made.tensors(), before, [0, 2, 4])


def test_resetting_nobody_changes_nothing() -> None:
    made = scrambled(bank())
    before = snapshot(made)
    nobody = torch.zeros(0, dtype=torch.int64)
    made.reset(nobody, nobody.short(), "s")
    made.park(nobody)
    made.bring_back(nobody)
    assert same_rows(made.tensors(), before, list(range(SEEDS)))


def test_lesson_22_a_parked_row_comes_back_with_every_bit() -> None:
    made = scrambled(bank())
    before = snapshot(made)
    made.park(torch.tensor([1, 4]))
    for value in made.tensors().values():
        value += 1
    damaged = snapshot(made)
    made.bring_back(torch.tensor([4, 3]))
    assert same_rows(made.tensors(), before, [4])
    assert same_rows(made.tensors(), damaged, [0, 1, 2, 3])
    assert made.parked.tolist() == [False, True, False, False, True]


def test_lesson_38_a_copy_does_not_follow_the_live_row() -> None:
    made = scrambled(bank())
    made.park(torch.tensor([0]))
    before = {name: value.clone() for name, value in made.copies().items()}
    for value in made.tensors().values():
        value.zero_()
    assert same_rows(made.copies(), before, [0])


def test_parking_again_overwrites_the_copy() -> None:
    made = bank()
    made.park(torch.tensor([0]))
    scrambled(made)
    newer = snapshot(made)
    made.park(torch.tensor([0]))
    assert same_rows(made.copies(), newer, [0])


@pytest.mark.parametrize("name", blueprint_names())
def test_lesson_03_weights_are_parameters_and_the_rest_is_in_the_state_dict(name: str) -> None:
    made = scrambled(bank(name))
    made.park(torch.tensor([1]))
    assert set(dict(made.named_parameters())) == {f"weights.{n}" for n in made.specs}
    twin = bank(name)
    twin.load_state_dict(made.state_dict())
    assert same_rows(twin.tensors(), made.tensors(), list(range(SEEDS)))
    assert same_rows(twin.copies(), made.copies(), list(range(SEEDS)))
    assert torch.equal(twin.parked, made.parked)


def test_a_seed_counts_its_own_weights() -> None:
    made = bank()
    assert made.weights_per_seed * SEEDS == sum(p.numel() for p in made.parameters())
    assert made.weights_per_seed == 4 * 3 + 3 + 3 * 4 + 4


# ---- slots -------------------------------------------------------------------------------------

MANY = 300


def wide() -> SeedBank:
    return SeedBank(blueprint("bottleneck"), BlueprintShape(2, 3), MANY)


def bear(made: SeedBank, ids: list[int]) -> None:
    made.reset(torch.tensor(ids), torch.zeros(len(ids), dtype=torch.int16), "s")


def of(made: SeedBank, ids: list[int]) -> Rows:
    slots = made.slots(torch.tensor(ids))
    assert (slots >= 0).all()
    return {name: value[slots] for name, value in made.tensors().items()}


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.booleans(),
            st.lists(st.integers(0, MANY - 1), unique=True, min_size=1, max_size=MANY),
        ),
        max_size=6,
    )
)
def test_slots_and_the_seeds_that_hold_them_always_agree(
    steps: list[tuple[bool, list[int]]],
) -> None:
    made, holders = wide(), set[int]()
    for born_now, ids in steps:
        if born_now:
            bear(made, ids)
            holders |= set(ids)
        else:
            made.forget(torch.tensor(ids))
            holders -= set(ids)
        assert set(made.seed_of_slot[made.seed_of_slot >= 0].tolist()) == holders
        assert set((made.slot_of_seed >= 0).nonzero().flatten().tolist()) == holders
        some = torch.tensor(sorted(holders), dtype=torch.int64)
        assert made.seed_of_slot[made.slots(some)].tolist() == some.tolist()
        assert len(made.weights["w_in"]) == len(made.parked) == made.num_slots <= MANY


def test_a_bank_grows_when_more_seeds_are_born_than_it_has_room_for() -> None:
    made = wide()
    bear(made, [7])
    scrambled(made)
    made.park(torch.tensor([7]))
    before, rooms = of(made, [7]), [made.num_slots]
    for ids in ([8, 9], list(range(100, 170)), list(range(170, MANY)), list(range(MANY))):
        bear(made, [i for i in ids if i != 7])
        rooms.append(made.num_slots)
        assert same_rows(of(made, [7]), before, [0])
    assert rooms == [64, 64, 128, 256, MANY]
    assert made.parked.nonzero().flatten().tolist() == made.slots(torch.tensor([7])).tolist()


def test_a_slot_that_was_freed_is_given_again_and_holds_nothing_of_its_last_seed() -> None:
    made = wide()
    bear(made, [1, 2])
    scrambled(made)
    made.park(torch.tensor([2]))
    freed = made.slots(torch.tensor([2]))
    made.forget(torch.tensor([2]))
    bear(made, [250])
    assert made.slots(torch.tensor([250])).tolist() == freed.tolist()
    newborn = wide()
    bear(newborn, [250])
    assert same_rows(of(made, [250]), of(newborn, [250]), [0])
    assert not made.parked.any()


def test_a_seed_that_holds_nothing_has_no_output_to_give() -> None:
    made = wide()
    bear(made, [1])
    with pytest.raises(IndexError):
        made.delta(torch.zeros(2, 1, 2), torch.zeros(2, 2), torch.tensor([3]))


def test_a_state_dict_carries_its_slots_into_a_bank_of_another_size() -> None:
    large, small = wide(), wide()
    bear(large, list(range(100)))
    bear(small, [5])
    scrambled(large)
    for source, target in ((large, wide()), (small, copy.deepcopy(large))):
        target.load_state_dict(source.state_dict())
        assert target.num_slots == source.num_slots
        assert all(map(same_bits, target.state_dict().values(), source.state_dict().values()))


def test_a_bank_of_few_seeds_has_a_slot_for_each() -> None:
    made = bank()
    made.forget(torch.arange(SEEDS))
    assert made.slots(torch.arange(SEEDS)).tolist() == list(range(SEEDS))
