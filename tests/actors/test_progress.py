"""What a run has counted: by hand, through JSON, and from damaged JSON."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_ray.actors.progress import Progress, count_seeds, occupied
from esper_ray.errors import CorruptError
from esper_ray.grafting import StrategyOutcome, StrategyOutcomes
from esper_ray.lifecycle import Cause
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.policy import Measurement
from tests.builders import telemetry, transitions

OUTCOMES = st.dictionaries(
    st.sampled_from(["linear", "momentum"]),
    st.builds(StrategyOutcome, planted=st.integers(0, 9), delta_sum=st.floats(-1, 1)),
).map(StrategyOutcomes)


@given(
    st.builds(
        Progress,
        number=st.integers(0, 2**40),
        transitions=st.integers(0, 2**40),
        states_visited=st.lists(st.sampled_from([s.name for s in S]), unique=True),
        sequence=st.integers(0, 2**40),
        gate_losses=st.lists(st.floats(allow_nan=False), max_size=5),
        gate_accuracies=st.lists(st.floats(0, 1), max_size=5),
        seeds=st.dictionaries(
            st.text(max_size=5), st.dictionaries(st.just("TRAINING"), st.just(1))
        ),
        outcomes=OUTCOMES,
    )
)
def test_progress_goes_through_json_bit_for_bit(progress: Progress) -> None:
    stored = json.loads(json.dumps(progress.to_json(), allow_nan=False))
    assert Progress.from_json(stored) == progress


def test_progress_keeps_a_loss_that_is_not_a_number() -> None:
    stored = json.dumps(Progress(gate_losses=[math.nan, math.inf]).to_json(), allow_nan=False)
    first, second = Progress.from_json(json.loads(stored)).gate_losses
    assert math.isnan(first)
    assert second == math.inf


def test_progress_of_another_form_is_refused() -> None:
    whole = Progress().to_json()
    for damage in ({"gate_losses": 1}, {"gate_accuracies": ["x"]}, {"outcomes": "[]"}, {"more": 1}):
        with pytest.raises(CorruptError, match="cannot be read"):
            Progress.from_json({**whole, **damage})


@pytest.mark.parametrize("name", ["gate_losses", "gate_accuracies", "outcomes"])
def test_progress_without_a_part_is_refused(name: str) -> None:
    whole = Progress().to_json()
    del whole[name]
    with pytest.raises(CorruptError, match="cannot be read"):
        Progress.from_json(whole)


# ------------------------------------------------------------------ counting


def test_gate_results_are_kept_for_the_last_five_epochs() -> None:
    progress = Progress()
    for epoch in range(7):
        progress.observe(float(epoch), epoch / 10)
    assert progress.gate_losses == [2.0, 3.0, 4.0, 5.0, 6.0]
    assert progress.gate_accuracies == [0.2, 0.3, 0.4, 0.5, 0.6]


def test_applied_rows_are_counted_by_the_strategy_of_their_seeds() -> None:
    progress, seen = Progress(), telemetry([S.DORMANT] * 3, strategy=np.array([0, 0, 0], np.int32))
    progress.count(
        transitions([0, 1, 2], S.DORMANT, S.GERMINATED, strategy=[0, 2, 2]), seen, measured={}
    )
    assert progress.outcomes["linear"].planted == 1
    assert progress.outcomes["momentum"].planted == 2
    assert (progress.transitions, progress.states_visited) == (3, ["DORMANT", "GERMINATED"])


@pytest.mark.parametrize(
    ("source", "target", "ending"),
    [
        (S.FINE_TUNING, S.FOSSILIZED, "fossilized"),
        (S.TRAINING, S.CULLED, "culled"),
        (S.GRAFTING, S.ROLLED_BACK, "rolled_back"),
        (S.TRAINING, S.CANCELLED, None),
    ],
)
def test_endings_are_counted_for_the_strategy_that_the_seed_had(
    source: S, target: S, ending: str | None
) -> None:
    progress, seen = Progress(), telemetry([source] * 2, strategy=np.array([4, 3], np.int32))
    progress.count(transitions([1], source, target), seen, measured={})
    endings = {name: 1 for name in [ending] if name is not None}
    assert progress.outcomes["adaptive"] == StrategyOutcome(**endings)
    assert progress.outcomes["stability"] == StrategyOutcome()


def test_gain_is_counted_when_a_seed_leaves_evaluating_and_was_measured() -> None:
    progress, seen = Progress(), telemetry([S.EVALUATING] * 3)
    measured = {0: Measurement(1.0, 2.0, 0.5, 0.4), 2: Measurement(1.0, 2.0, math.nan, math.nan)}
    batch = transitions([0, 1, 2], S.EVALUATING, [S.FINE_TUNING, S.ROLLED_BACK, S.CULLED])
    progress.count(batch, seen, measured)
    found = progress.outcomes["linear"]
    assert (found.evaluated, found.delta_sum) == (1, 0.5)
    assert (found.culled, found.rolled_back) == (1, 1)


def test_states_visited_stand_in_the_order_of_the_lifecycle() -> None:
    progress, seen = Progress(), telemetry([S.TRAINING] * 2)
    progress.count(transitions([0], S.TRAINING, S.CULLED), seen, {})
    progress.count(transitions([1], S.TRAINING, S.GRAFTING), seen, {})
    assert progress.states_visited == ["DORMANT", "GRAFTING", "CULLED"]


def test_new_generation_is_no_transition_and_plants_nothing() -> None:
    progress, seen = Progress(), telemetry([S.CULLED] * 2)
    batch = transitions([0, 1], S.CULLED, S.DORMANT, cause=Cause.REPLANT)
    progress.count(batch, seen, {})
    assert (progress.transitions, progress.outcomes) == (0, StrategyOutcomes())


# ------------------------------------------------------------------ seeds by state


def test_occupied_has_a_number_for_every_state() -> None:
    found = occupied(telemetry([S.TRAINING, S.TRAINING, S.ROLLED_BACK]))
    assert found.tolist() == [0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1]


def test_seeds_are_counted_where_the_batches_put_them() -> None:
    seen = {name: telemetry([S.DORMANT, S.TRAINING], layer_id=name) for name in "ab"}
    moved = transitions([1], S.TRAINING, S.CULLED, layer_id="b")
    assert count_seeds(seen, [moved]) == {
        "a": {"DORMANT": 1, "TRAINING": 1},
        "b": {"DORMANT": 1, "CULLED": 1},
    }
    assert seen["b"].state.tolist() == [S.DORMANT, S.TRAINING]  # the report itself is untouched
