"""From columns and bounds to rows: what is stored is what is shown."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_ray.errors import ConfigError
from esper_ray.lifecycle import ExtendedLifecycle
from esper_ray.picture import Health, lines, same_runs
from esper_ray.picture.rows import SEEDS_PER_LINE
from tests.picture.layers import layer, motley, picture

_S = ExtendedLifecycle
sizes = st.lists(st.integers(1, 40), min_size=1, max_size=400)


@given(sizes=sizes)
def test_chunks_cover_the_width_without_a_gap(sizes: list[int]) -> None:
    chunks = layer(len(sizes), sum(sizes), sizes=sizes).chunks
    assert [chunk.stop - chunk.start for chunk in chunks] == sizes
    assert [chunk.seed_id for chunk in chunks] == list(range(len(sizes)))
    assert chunks[0].start == 0
    assert all(a.stop == b.start for a, b in itertools.pairwise(chunks))


def test_row_shows_what_is_stored_of_its_seed() -> None:
    found = layer(
        2,
        9,
        lifecycle_state=[3, 7],
        alpha=[0.25, 1.0],
        error_count=[0, 2],
        evaluation_score=[-12, 30],
        performance_metrics=[[2.0, 0.5, 0.75, 0.125], [3.0, 0.0, 0.0, 0.0]],
        metrics_valid=[0b1011, 0b0000],
    )
    one, other = found.chunks
    assert (one.start, one.stop, one.state, one.alpha) == (0, 5, _S.GRAFTING, 0.25)
    assert (one.score, one.errors) == (-0.012, 0)
    assert one.metrics == {"loss": 2.0, "accuracy": 0.5, "efficiency": 0.125}
    assert (other.start, other.stop, other.state) == (5, 9, _S.FOSSILIZED)
    assert (other.score, other.metrics, other.errors) == (None, {}, 2)
    assert found.states == {"GRAFTING": 1, "FOSSILIZED": 1}


@pytest.mark.parametrize(
    ("errors", "score", "valid", "health"),
    [
        (6, 0, 15, Health.FAILING),
        (6, -5, 0, Health.FAILING),
        (5, -5, 15, Health.ERRORS),
        (1, 5, 0, Health.ERRORS),
        (0, -1, 15, Health.HARMFUL),
        (0, -1, 1, Health.HARMFUL),
        (0, -1, 14, Health.UNMEASURED),
        (0, 0, 15, Health.SOUND),
        (0, 5, 1, Health.SOUND),
        (0, 0, 0, Health.UNMEASURED),
    ],
)
def test_health_is_the_worst_that_applies(
    errors: int, score: int, valid: int, health: Health
) -> None:
    found = layer(1, 1, error_count=[errors], evaluation_score=[score], metrics_valid=[valid])
    assert found.chunks[0].health is health


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_metric_that_is_no_number_was_not_measured(value: float) -> None:
    found = layer(1, 1, performance_metrics=[[value, 0.5, 0, 0]], metrics_valid=[3])
    assert found.chunks[0].metrics == {"accuracy": 0.5}
    assert found.chunks[0].health is Health.UNMEASURED


@given(sizes=sizes)
def test_lines_hold_every_chunk_once_and_are_few(sizes: list[int]) -> None:
    whole = layer(len(sizes), sum(sizes), sizes=sizes)
    cut = lines(whole)
    assert tuple(itertools.chain(*cut)) == whole.chunks
    assert all(cut)
    assert len(cut) <= -(-len(sizes) // SEEDS_PER_LINE)


@given(states=st.lists(st.integers(0, 2), min_size=1, max_size=60))
def test_runs_hold_every_chunk_once_and_differ_from_their_neighbours(states: list[int]) -> None:
    chunks = layer(len(states), len(states), lifecycle_state=states).chunks
    runs = list(same_runs(chunks))
    assert tuple(itertools.chain(*runs)) == chunks
    assert all(len({chunk.state for chunk in run}) == 1 for run in runs)
    assert all(a[0].state != b[0].state for a, b in itertools.pairwise(runs))


def test_seeds_of_other_alpha_or_health_are_no_run() -> None:
    chunks = layer(4, 4, alpha=[0.1, 0.2, 0.2, 0.2], error_count=[0, 0, 1, 1]).chunks
    assert [len(run) for run in same_runs(chunks)] == [1, 1, 2]


def test_one_layer_can_be_taken_and_no_other() -> None:
    both = picture(layer(2, 4, "reader.hidden"), layer(2, 4, "writer"))
    assert both.only(None) is both
    assert [found.layer_id for found in both.only("writer").layers] == ["writer"]
    with pytest.raises(ConfigError, match="no layer 'riter' carries seeds") as caught:
        both.only("riter")
    assert caught.value.hint == "the nearest are writer, reader.hidden"
    with pytest.raises(ConfigError) as caught:
        picture().only("writer")
    assert caught.value.hint == "no layer carries seeds here"


def test_json_counts_seeds_by_state_in_the_order_of_the_lifecycle() -> None:
    found = picture(motley(13, 26)).to_json("a.png")
    (told,) = found["layers"]
    assert found["out"] == "a.png"
    assert (told["layer_id"], told["width"], told["seeds"]) == ("reader.hidden", 26, 13)
    assert list(told["states"]) == [state.name for state in ExtendedLifecycle]
    assert sum(told["states"].values()) == 13
