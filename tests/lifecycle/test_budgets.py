"""Budgets: how many seeds enter TRAINING and GRAFTING, and which ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from esper_ray.lifecycle import Budgets, Decisions, LifecycleManager, Refusal
from esper_ray.lifecycle import ExtendedLifecycle as S
from tests.lifecycle.rows import OPEN, Row, names_of, requests

STEPS = {S.TRAINING: S.GERMINATED, S.GRAFTING: S.TRAINING}
LIMITS = {
    S.TRAINING: ("training_per_layer", "training_in_all"),
    S.GRAFTING: ("grafting_per_layer", "grafting_in_all"),
}
NO_MINIMA: dict[S, int] = {}


def counts(**states: int) -> NDArray[np.int64]:
    seeds = np.zeros(len(S), dtype=np.int64)
    for name, number in states.items():
        seeds[S[name]] = number
    return seeds


def asking(state: S, waits: Sequence[int], layer_id: str = "layer", first: int = 0) -> Decisions:
    """Seeds of one layer that may enter `state`, by how long they have waited."""
    rows = [Row(STEPS[state], state, wait, seed=first + i) for i, wait in enumerate(waits)]
    return LifecycleManager(minimum_epochs=NO_MINIMA).judge(requests(rows, layer_id=layer_id))


def admitted(
    budgets: Budgets, occupied: Mapping[str, NDArray[np.int64]], *decided: Decisions
) -> dict[str, list[int]]:
    """Ids of the seeds that may still move, by layer; the others must be refused for room."""
    manager = LifecycleManager(minimum_epochs=NO_MINIMA, budgets=budgets)
    kept = manager.admit(decided, occupied)
    assert [d.requests for d in kept] == [d.requests for d in decided]
    for before, after in zip(decided, kept, strict=True):
        changed = before.reason != after.reason
        assert (after.reason[changed] == Refusal.BUDGET).all()
        assert before.accepted[changed].all()
    return {d.requests.layer_id: d.requests.seed_ids[d.accepted].tolist() for d in kept}


def limit(state: S, *, per_layer: int | None = None, in_all: int | None = None) -> Budgets:
    names = zip(LIMITS[state], (per_layer, in_all), strict=True)
    return Budgets(**{name: value for name, value in names if value is not None})


@pytest.mark.parametrize("state", list(STEPS))
@pytest.mark.parametrize(
    ("occupied", "limited", "enter"), [(0, 2, 2), (1, 2, 1), (2, 2, 0), (5, 2, 0), (0, 9, 4)]
)
@pytest.mark.parametrize("whose", ["per_layer", "in_all"])
def test_no_more_seeds_enter_than_the_budget_has_room_for(
    state: S, occupied: int, limited: int, enter: int, whose: str
) -> None:
    budgets = limit(state, **{whose: limited})
    room = {"layer": counts(**{state.name: occupied})}
    assert admitted(budgets, room, asking(state, [4, 3, 2, 1])) == {"layer": [0, 1, 2, 3][:enter]}


@pytest.mark.parametrize("state", list(STEPS))
def test_a_budget_of_one_state_holds_nobody_back_from_the_other(state: S) -> None:
    other = S.GRAFTING if state is S.TRAINING else S.TRAINING
    budgets = limit(state, per_layer=1, in_all=1)
    full = {"layer": counts(TRAINING=50, GRAFTING=50)}
    assert admitted(budgets, full, asking(other, [1, 1])) == {"layer": [0, 1]}
    assert admitted(budgets, full, asking(state, [1, 1])) == {"layer": []}


def test_other_moves_need_no_room() -> None:
    rows = [
        Row(S.DORMANT, S.GERMINATED),
        Row(S.GRAFTING, S.STABILIZATION),
        Row(S.TRAINING, S.CULLED),
        Row(S.TRAINING, S.CANCELLED),
        Row(S.GRAFTING, S.ROLLED_BACK),
    ]
    decided = LifecycleManager().judge(requests(rows))
    full = {"layer": counts(TRAINING=9, GRAFTING=9)}
    assert admitted(Budgets(1, 1, 1, 1), full, decided) == {"layer": [0, 1, 2, 3, 4]}


def test_rows_refused_already_take_no_room_and_keep_their_reason() -> None:
    rows = [
        Row(S.DORMANT, S.TRAINING, 90),
        Row(99, S.TRAINING, 80),
        Row(S.GERMINATED, S.TRAINING, 3),
        Row(S.GERMINATED, S.TRAINING, 5),
    ]
    decided = LifecycleManager().judge(requests(rows))
    manager = LifecycleManager(budgets=limit(S.TRAINING, in_all=1))
    [kept] = manager.admit([decided], {"layer": counts()})
    assert names_of(kept) == ["NOT_IN_TABLE", "UNKNOWN_STATE", "BUDGET", "NONE"]


def test_without_budgets_all_that_was_accepted_is_admitted() -> None:
    full = {"layer": counts(TRAINING=10**6)}
    assert admitted(Budgets(), full, asking(S.TRAINING, [1] * 50)) == {"layer": list(range(50))}


def test_nothing_asked_is_nothing_admitted() -> None:
    tight = Budgets(1, 1, 1, 1)
    manager = LifecycleManager(budgets=tight)
    assert manager.admit([], {}) == []
    assert manager.admit([], {"layer": counts(TRAINING=3)}) == []
    empty = LifecycleManager().judge(requests([]))
    assert admitted(tight, {"layer": counts()}, empty) == {"layer": []}


def test_room_that_is_freed_counts_from_the_next_epoch() -> None:
    rows = [
        Row(S.TRAINING, S.CULLED),
        Row(S.GERMINATED, S.TRAINING),
    ]
    decided = LifecycleManager().judge(requests(rows))
    budgets = limit(S.TRAINING, per_layer=1)
    assert admitted(budgets, {"layer": counts(TRAINING=1)}, decided) == {"layer": [0]}
    assert admitted(budgets, {"layer": counts()}, decided) == {"layer": [0, 1]}


def test_layers_that_ask_for_nothing_count_for_the_budget_in_all() -> None:
    occupied = {"a": counts(TRAINING=1), "b": counts(TRAINING=2)}
    budgets = limit(S.TRAINING, in_all=4)
    assert admitted(budgets, occupied, asking(S.TRAINING, [1, 1], "a")) == {"a": [0]}


# ---- who goes first ----------------------------------------------------------------------------


def test_within_a_layer_the_seed_that_has_waited_longest_goes_first() -> None:
    budgets = limit(S.TRAINING, per_layer=2)
    decided = asking(S.TRAINING, [3, 9, 1, 9, 9], first=10)
    assert admitted(budgets, {"layer": counts()}, decided) == {"layer": [11, 13]}


def test_equals_of_a_layer_go_by_seed_number_in_whatever_order_they_ask() -> None:
    rows = [Row(S.GERMINATED, S.TRAINING, 5, seed=seed) for seed in (8, 2, 5)]
    decided = LifecycleManager().judge(requests(rows))
    assert admitted(limit(S.TRAINING, in_all=2), {"layer": counts()}, decided) == {"layer": [2, 5]}


def test_the_layer_with_the_fewest_seeds_goes_first() -> None:
    occupied = {"a": counts(TRAINING=2), "b": counts(), "c": counts(TRAINING=1)}
    long = {"a": 90, "b": 1, "c": 40}
    decided = [asking(S.TRAINING, [waits] * 3, name) for name, waits in long.items()]
    for room, expected in [
        (1, {"a": [], "b": [0], "c": []}),
        (2, {"a": [], "b": [0], "c": [0]}),
        (3, {"a": [], "b": [0, 1], "c": [0]}),
        (4, {"a": [0], "b": [0, 1], "c": [0]}),
        (5, {"a": [0], "b": [0, 1], "c": [0, 1]}),
        (6, {"a": [0], "b": [0, 1, 2], "c": [0, 1]}),
    ]:
        assert admitted(limit(S.TRAINING, in_all=3 + room), occupied, *decided) == expected


def test_between_equal_layers_the_longest_wait_goes_first_and_then_the_first_layer() -> None:
    empty = {"a": counts(), "b": counts()}
    one = limit(S.GRAFTING, in_all=1)
    long = [asking(S.GRAFTING, [1], "a"), asking(S.GRAFTING, [2], "b")]
    assert admitted(one, empty, *long) == {"a": [], "b": [0]}
    same = [asking(S.GRAFTING, [2], "a", first=9), asking(S.GRAFTING, [2], "b")]
    assert admitted(one, empty, *same) == {"a": [9], "b": []}


def test_a_full_layer_leaves_its_room_to_the_others() -> None:
    occupied = {"a": counts(TRAINING=2), "b": counts()}
    decided = [asking(S.TRAINING, [9, 9], "a"), asking(S.TRAINING, [1, 1, 1], "b")]
    budgets = limit(S.TRAINING, per_layer=2, in_all=9)
    assert admitted(budgets, occupied, *decided) == {"a": [], "b": [0, 1]}


def greedy(
    waits: list[list[int]], taken: list[int], per_layer: int, in_all: int
) -> list[list[int]]:
    """One seed at a time: the emptiest layer's longest waiting one, until nothing fits."""
    inside, chosen = list(taken), [list[int]() for _ in waits]
    while sum(inside) < in_all:
        heads = []
        for layer, waiting in enumerate(waits):
            left = [(-w, seed) for seed, w in enumerate(waiting) if seed not in chosen[layer]]
            if left and inside[layer] < per_layer:
                wait, seed = min(left)
                heads.append((inside[layer], wait, layer, seed))
        if not heads:
            break
        _, _, layer, seed = min(heads)
        chosen[layer].append(seed)
        inside[layer] += 1
    return [sorted(seeds) for seeds in chosen]


@settings(max_examples=200, deadline=None)
@given(
    layers=st.lists(
        st.tuples(st.lists(st.integers(0, 4), max_size=6), st.integers(0, 4)), max_size=4
    ),
    per_layer=st.integers(1, 6),
    in_all=st.integers(1, 12),
    state=st.sampled_from(list(STEPS)),
)
def test_seeds_are_admitted_as_if_chosen_one_at_a_time(
    layers: list[tuple[list[int], int]], per_layer: int, in_all: int, state: S
) -> None:
    waits, taken = [w for w, _ in layers], [t for _, t in layers]
    occupied = {str(i): counts(**{state.name: t}) for i, t in enumerate(taken)}
    decided = [asking(state, w, str(i)) for i, w in enumerate(waits)]
    budgets = limit(state, per_layer=per_layer, in_all=in_all)
    expected = greedy(waits, taken, per_layer, in_all)
    assert list(admitted(budgets, occupied, *decided).values()) == expected


# ---- over many epochs --------------------------------------------------------------------------


class Simulation:
    """Layers of seeds that go from GERMINATED through TRAINING and GRAFTING to an end."""

    def __init__(self, sizes: Mapping[str, int], budgets: Budgets, seed: int) -> None:
        self.manager = LifecycleManager(minimum_epochs=NO_MINIMA, budgets=budgets)
        self.state = {name: np.full(n, S.GERMINATED, np.int32) for name, n in sizes.items()}
        self.epochs = {name: np.zeros(n, np.int32) for name, n in sizes.items()}
        self.stay = np.random.default_rng(seed)

    def occupied(self) -> dict[str, NDArray[np.int64]]:
        return {name: np.bincount(s, minlength=len(S)) for name, s in self.state.items()}

    def step(self) -> list[Decisions]:
        judged = []
        for name, states in self.state.items():
            rows = [
                Row(state, self.target(state), epochs, metrics=OPEN, seed=seed)
                for seed, (state, epochs) in enumerate(
                    zip(states.tolist(), self.epochs[name].tolist(), strict=True)
                )
                if state < S.STABILIZATION and (state == S.GERMINATED or self.stay.random() < 0.3)
            ]
            judged.append(self.manager.judge(requests(rows, layer_id=name)))
        kept = self.manager.admit(judged, self.occupied())
        for decided in kept:
            asked, name = decided.requests, decided.requests.layer_id
            self.epochs[name] += 1
            moved = asked.seed_ids[decided.accepted]
            self.state[name][moved] = asked.target[decided.accepted]
            self.epochs[name][moved] = 0
        return kept

    @staticmethod
    def target(state: int) -> S:
        return {S.GERMINATED: S.TRAINING, S.TRAINING: S.GRAFTING}.get(S(state), S.STABILIZATION)


@pytest.mark.parametrize(
    "budgets",
    [
        Budgets(training_per_layer=2, training_in_all=4, grafting_per_layer=1, grafting_in_all=2),
        Budgets(training_in_all=1, grafting_in_all=1),
        Budgets(training_per_layer=1),
        Budgets(grafting_per_layer=1),
    ],
)
def test_over_many_epochs_no_budget_is_exceeded_and_no_seed_waits_for_ever(
    budgets: Budgets,
) -> None:
    growth = Simulation({"a": 12, "b": 3, "c": 1, "d": 7}, budgets, seed=1)
    for _ in range(400):
        growth.step()
        inside = list(growth.occupied().values())
        for state, (per_layer, in_all) in LIMITS.items():
            assert max(int(n[state]) for n in inside) <= getattr(budgets, per_layer)
            assert sum(int(n[state]) for n in inside) <= getattr(budgets, in_all)
    assert all((states == S.STABILIZATION).all() for states in growth.state.values())


def test_over_many_epochs_seeds_of_a_layer_enter_in_the_order_of_their_wait() -> None:
    growth = Simulation({"a": 6, "b": 6}, limit(S.TRAINING, in_all=1), seed=2)
    entered: dict[str, list[int]] = {"a": [], "b": []}
    for _ in range(200):
        for decided in growth.step():
            asked = decided.requests
            into = decided.accepted & (asked.target == S.TRAINING)
            entered[asked.layer_id] += asked.seed_ids[into].tolist()
    assert entered == {"a": list(range(6)), "b": list(range(6))}
