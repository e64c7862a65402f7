"""The one writer of seed state, against a slow model that writes row by row."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.seeds import ExtendedStateTensor
from esper_ray.seeds.rows import repeated
from tests.seeds.histories import (
    FIXED,
    SEEDS,
    Epoch,
    Failures,
    Happening,
    Measured,
    Moves,
    batch_of,
    begin,
    happen,
    histories,
    metrics_of,
    road,
    same_state,
    signals_of,
    starts,
)
from tests.seeds.slow_model import LAST, Row, SlowLayer, picture


def follow(model: SlowLayer, drawn: Happening, state: ExtendedStateTensor) -> list[int]:
    """Do to the model what is about to be done to the tensor."""
    match drawn:
        case Moves():
            return model.compare_and_set(batch_of(drawn, state), drawn.mode)
        case Measured():
            return model.record(metrics_of(drawn))
        case Epoch():
            model.count_errors(drawn.errors)
            model.advance(signals_of(drawn, state))
        case Failures():
            model.count_errors(drawn.errors)
    return []


@settings(max_examples=120, deadline=None)
@given(to=starts, drawn=histories, generation=st.sampled_from([0, LAST - 1, LAST]))
def test_lesson_20_every_change_is_what_the_slow_model_writes(
    to: list[S], drawn: list[Happening], generation: int
) -> None:
    state = ExtendedStateTensor(SEEDS)
    model = SlowLayer([Row(generation=generation) for _ in range(SEEDS)], FIXED)
    begin(state, to)
    for batch in road(to):
        batch.expected_generation[:] = generation
        model.compare_and_set(batch, "all")
    state.generation.fill_(generation)
    state.changed()
    for happening in drawn:
        expected = follow(model, happening, state)
        assert happen(state, happening, FIXED) == expected
        assert picture(state) == picture(model)


@settings(max_examples=25, deadline=None)
@given(to=starts, drawn=histories)
def test_readers_see_every_change_at_once_in_copies_of_their_own(
    to: list[S], drawn: list[Happening]
) -> None:
    state = ExtendedStateTensor(SEEDS)
    begin(state, to)
    for happening in drawn:
        happen(state, happening, FIXED)
        view, some = state.view(), state.rows(np.array([3, 0]))
        assert view.state.tolist() == state.lifecycle_state.tolist()
        assert view.epochs_in_state.tolist() == state.columns[state.EPOCHS_IN_STATE].tolist()
        assert view.error_count.tolist() == state.columns[state.ERROR_COUNT].tolist()
        assert view.strategy.tolist() == state.columns[state.GRAFTING_STRATEGY].tolist()
        assert view.alpha.tolist() == state.alpha.tolist()
        assert view.generation.tolist() == state.generation.tolist()
        assert view.rows(S.GRAFTING).tolist() == state.grafting.seed_ids.tolist()
        for name in (*SHOWN, "generation", "alpha"):
            assert getattr(view, name)[[3, 0]].tolist() == getattr(some, name).tolist()
        assert not any(np.shares_memory(getattr(view, n), state.host("columns")) for n in SHOWN)


SHOWN = ("state", "epochs_in_state", "strategy", "error_count")


@settings(max_examples=25, deadline=None)
@given(to=starts, drawn=histories)
def test_alpha_is_one_where_blended_and_zero_where_nothing_grows(
    to: list[S], drawn: list[Happening]
) -> None:
    state = ExtendedStateTensor(SEEDS)
    begin(state, to)
    for happening in drawn:
        happen(state, happening, FIXED)
        for code, alpha in zip(state.lifecycle_state.tolist(), state.alpha.tolist(), strict=True):
            assert 0.0 <= alpha <= 1.0
            assert code == S.GRAFTING or alpha == float(S.STABILIZATION <= code <= S.FOSSILIZED)


@settings(max_examples=25, deadline=None)
@given(to=starts, drawn=histories)
def test_a_batch_that_is_refused_in_mode_all_changes_nothing(
    to: list[S], drawn: list[Happening]
) -> None:
    state, twin = ExtendedStateTensor(SEEDS), ExtendedStateTensor(SEEDS)
    begin(state, to)
    begin(twin, to)
    for happening in drawn:
        if isinstance(happening, Moves):
            applied, reason = state.compare_and_set(batch_of(happening, state), mode="all")
            assert applied.all() or (not applied.any() and reason.all())
            if applied.any():
                twin.compare_and_set(batch_of(happening, twin), mode="all")
            assert same_state(state, twin)


@given(ids=st.lists(st.integers(-3, 9)))
def test_lesson_21_every_row_of_a_repeated_id_is_found(ids: list[int]) -> None:
    found = repeated(np.array(ids, dtype=np.int64))
    assert found.tolist() == [ids.count(number) > 1 for number in ids]


def test_errors_of_several_forwards_add_up() -> None:
    state = ExtendedStateTensor(3)
    assert state.view().error_count.tolist() == [0, 0, 0]
    state.count_errors(torch.tensor([True, False, True]))
    state.count_errors(torch.tensor([True, False, False]))
    assert state.view().error_count.tolist() == [2, 0, 1]
