"""Phase 1's four columns: a view, an export in its widths, and the way from its states."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esper_ray.errors import ConfigError
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.lifecycle import Refusal
from esper_ray.seeds import ExtendedStateTensor, Phase1State, StateTensor, migrate
from esper_ray.seeds.phase1 import TO_PHASE1, TO_PHASE2
from tests.builders import signals, transitions, walk
from tests.seeds.histories import FIXED

P = Phase1State
FORWARD = [
    (P.DORMANT, S.DORMANT, 0.0),
    (P.LOADING, S.GRAFTING, 0.375),
    (P.ACTIVE, S.STABILIZATION, 1.0),
    (P.ERROR_RECOVERY, S.ROLLED_BACK, 0.0),
    (P.FOSSILIZED, S.FOSSILIZED, 1.0),
]
BACK = [
    (S.DORMANT, P.DORMANT),
    (S.GERMINATED, P.LOADING),
    (S.TRAINING, P.LOADING),
    (S.GRAFTING, P.LOADING),
    (S.STABILIZATION, P.ACTIVE),
    (S.EVALUATING, P.ACTIVE),
    (S.FINE_TUNING, P.ACTIVE),
    (S.FOSSILIZED, P.FOSSILIZED),
    (S.CULLED, P.ERROR_RECOVERY),
    (S.CANCELLED, P.DORMANT),
    (S.ROLLED_BACK, P.ERROR_RECOVERY),
]


def table(*rows: tuple[int, int, int, int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(rows, dtype=dtype).reshape(-1, 4)


# ---- the view and the export -----------------------------------------------------------------


def test_the_table_is_a_view_of_the_columns() -> None:
    state = ExtendedStateTensor(3)
    seen = StateTensor(state)
    assert (tuple(seen.data.shape), seen.data.dtype) == ((3, 4), torch.int32)
    assert seen.data.data_ptr() == state.columns.data_ptr()
    batch = transitions([1], S.DORMANT, S.GERMINATED, blueprint_id=7, strategy=2)
    state.compare_and_set(batch)
    state.advance(signals([]), FIXED)
    assert seen.data.tolist() == [[0, -1, 1, 0], [1, 7, 1, 2], [0, -1, 1, 0]]


@pytest.mark.parametrize(("state", "code"), BACK)
def test_every_state_is_exported_as_one_of_phase_1(state: S, code: Phase1State) -> None:
    holder = ExtendedStateTensor(2)
    walk(holder, [1], state)
    exported = StateTensor(holder).export()
    assert exported["lifecycle_state"].tolist() == [P.DORMANT, code]
    assert TO_PHASE1[state] is code


def test_the_export_has_phase_1s_widths_and_is_a_copy() -> None:
    state = ExtendedStateTensor(2)
    walk(state, [1], S.TRAINING)
    state.columns[state.EPOCHS_IN_STATE] = 70_000
    state.columns[state.BLUEPRINT_ID, 1] = 2**31 - 1
    exported = StateTensor(state).export()
    dtypes = {name: column.dtype for name, column in exported.items()}
    assert dtypes == {
        "lifecycle_state": torch.int8,
        "blueprint_id": torch.int32,
        "epochs_in_state": torch.int16,
        "grafting_strategy": torch.int8,
    }
    assert exported["epochs_in_state"].tolist() == [32_767, 32_767]
    assert exported["blueprint_id"].tolist() == [-1, 2**31 - 1]
    for column in exported.values():
        column.fill_(5)
    assert StateTensor(state).data.tolist() == [[0, -1, 70_000, 0], [2, 2**31 - 1, 70_000, 0]]


# ---- migration -------------------------------------------------------------------------------


def test_both_maps_know_every_state() -> None:
    assert set(TO_PHASE2) == set(P) == {code for code, _, _ in FORWARD}
    assert set(TO_PHASE1) == set(S) == {state for state, _ in BACK}
    assert all(TO_PHASE1[TO_PHASE2[code]] is code for code in P)


@pytest.mark.parametrize(("code", "state", "alpha"), FORWARD)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_every_phase_1_state_has_its_place(
    code: Phase1State, state: S, alpha: float, dtype: torch.dtype
) -> None:
    rows = table((code, 3, 40, 2), (P.DORMANT, 0, 5, 0), dtype=dtype)
    made = migrate(rows, torch.tensor([0.375, 0.0]))
    assert made.state_tensor[0].tolist() == [state, 3, 40, 2, -1, -1, 0, 0]
    assert made.state_tensor[1].tolist() == [S.DORMANT, -1, 5, 0, -1, -1, 0, 0]
    assert made.alpha.tolist() == [alpha, 0.0]
    assert made.view().state.tolist() == [state, S.DORMANT]
    assert made.grafting.seed_ids.tolist() == [0] * (state is S.GRAFTING)
    assert not made.transition_count.any()
    assert not made.generation.any()


codes = st.tuples(
    st.sampled_from(list(P)),
    st.integers(-1, 2**31 - 1),
    st.integers(0, 2**15 - 1),
    st.integers(0, 4),
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(codes, min_size=1, max_size=8))
def test_what_is_migrated_is_exported_as_it_was(rows: list[tuple[int, int, int, int]]) -> None:
    made = migrate(table(*rows))
    exported = StateTensor(made).export()
    kept = zip(*(column.tolist() for column in exported.values()), strict=True)
    for old, new in zip(rows, kept, strict=True):
        none = old[0] == P.DORMANT and old[1] == 0  # Phase 1 has no number for no blueprint
        assert new == ((old[0], -1, *old[2:]) if none else old)


def test_seeds_that_were_loading_go_on_grafting() -> None:
    made = migrate(table((P.LOADING, 0, 1, 0), (P.ACTIVE, 0, 0, 0)), torch.tensor([0.25, 0.0]))
    assert made.alpha.tolist() == [0.25, 1.0]
    made.advance(signals([0]), FIXED)
    made.advance(signals([0]), FIXED)
    assert made.alpha.tolist() == [1.0, 1.0]
    onward = transitions([0, 1], [S.GRAFTING, S.STABILIZATION], [S.STABILIZATION, S.EVALUATING])
    assert made.compare_and_set(onward)[1].tolist() == [Refusal.NONE] * 2


def test_without_alphas_a_loading_seed_starts_its_ramp_at_zero() -> None:
    assert migrate(table((P.LOADING, 0, 1, 0))).alpha.tolist() == [0.0]


def test_another_map_may_be_chosen() -> None:
    states = {**TO_PHASE2, P.LOADING: S.TRAINING, P.ERROR_RECOVERY: S.CULLED}
    rows = table((P.LOADING, 1, 0, 0), (P.ERROR_RECOVERY, 1, 0, 0))
    made = migrate(rows, torch.tensor([0.5, 0.0]), states)
    assert made.lifecycle_state.tolist() == [S.TRAINING, S.CULLED]
    assert made.alpha.tolist() == [0.0, 0.0]
    assert len(made.grafting) == 0


@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(2, 3, dtype=torch.int32),
        torch.zeros(2, 8, dtype=torch.int32),
        torch.zeros(2, 4, 1, dtype=torch.int32),
        torch.zeros(0, 4, dtype=torch.int32),
        torch.zeros(2, 4),
    ],
)
def test_a_table_of_another_shape_or_of_floats_is_refused(rows: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"has shape \(seeds, 4\) of integers"):
        migrate(rows)


@pytest.mark.parametrize(
    "row",
    [
        (-1, 0, 0, 0),
        (5, 0, 0, 0),
        (10, 0, 0, 0),
        (0, -2, 0, 0),
        (1, 0, -1, 0),
        (1, 0, 0, -1),
        (1, 2**31, 0, 0),
        (1, 0, 2**31, 0),
        (1, 0, 0, 2**40),
    ],
)
def test_the_first_row_that_phase_1_could_not_have_is_named(
    row: tuple[int, int, int, int],
) -> None:
    rows = table((0, 0, 0, 0), row, (99, 0, 0, 0), dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"seed 1 of the Phase 1 table is \[") as caught:
        migrate(rows)
    assert str(list(row)) in caught.value.message
    assert "states are 0..4" in caught.value.hint


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan"), float("inf")])
def test_an_alpha_outside_its_bounds_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match="seed 1 of the Phase 1 table"):
        migrate(table((1, 0, 0, 0), (1, 0, 0, 0)), torch.tensor([0.0, alpha]))


def test_alphas_of_another_number_of_seeds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"alpha has shape \(3,\) for 2 seeds"):
        migrate(table((1, 0, 0, 0), (1, 0, 0, 0)), torch.zeros(3))
