"""What a person may ask of a layer's seeds, and who is told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esper_ray.errors import ConfigError
from esper_ray.events import TransitionBatch
from esper_ray.layers import ChunkedKasminaLayer
from esper_ray.lifecycle import ACTIONS, LifecycleManager, Refusal
from esper_ray.lifecycle import ExtendedLifecycle as S
from tests.builders import transitions, walk

SEEDS = 4


@pytest.fixture
def layer() -> ChunkedKasminaLayer:
    torch.manual_seed(0)
    return ChunkedKasminaLayer(nn.Linear(6, 12), SEEDS, hidden=3)


def states(layer: ChunkedKasminaLayer) -> list[S]:
    return [S(code) for code in layer.state.view().state.tolist()]


def test_each_row_of_a_request_is_answered_and_the_good_ones_are_done(
    layer: ChunkedKasminaLayer,
) -> None:
    walk(layer, [1], S.FOSSILIZED)
    walk(layer, [2], S.GERMINATED)
    answers = layer.request("germinate", [0, 1, 2, 7, -1, 3, 3])
    assert answers == [
        Refusal.NONE,
        Refusal.TERMINAL,
        Refusal.NOT_IN_TABLE,
        Refusal.UNKNOWN_SEED,
        Refusal.UNKNOWN_SEED,
        Refusal.DUPLICATE_SEED,
        Refusal.DUPLICATE_SEED,
    ]
    assert states(layer) == [S.GERMINATED, S.FOSSILIZED, S.GERMINATED, S.DORMANT]
    assert layer.bank.weights["w_in"][0].any()  # a germinated seed has weights


def test_minimum_epochs_and_gates_hold_for_people_too(layer: ChunkedKasminaLayer) -> None:
    walk(layer, [0], S.TRAINING)
    walk(layer, [1], S.EVALUATING)
    assert layer.request("cull", [0]) == [Refusal.TOO_EARLY]
    layer.manager = LifecycleManager(minimum_epochs={S.TRAINING: 0, S.EVALUATING: 0})
    assert layer.request("cull", [0, 1]) == [Refusal.NONE, Refusal.GATE]
    assert states(layer)[:2] == [S.CULLED, S.EVALUATING]


def test_a_replanted_seed_starts_anew_without_what_it_held(layer: ChunkedKasminaLayer) -> None:
    walk(layer, [0], S.ROLLED_BACK)
    assert layer.bank.parked[0]
    assert layer.request("replant", [0]) == [Refusal.REPLANTING_OFF]
    layer.manager = LifecycleManager(replanting=True)
    assert layer.request("replant", [0, 1]) == [Refusal.NONE, Refusal.NOT_IN_TABLE]
    assert states(layer)[0] is S.DORMANT
    assert layer.state.generation.tolist() == [1, 0, 0, 0]
    assert not layer.bank.parked[0]
    assert not any(value[0].any() for value in layer.bank.tensors().values())


def test_a_germinated_seed_of_a_new_generation_has_other_weights(
    layer: ChunkedKasminaLayer,
) -> None:
    layer.manager = LifecycleManager(replanting=True)
    layer.request("germinate", [0])
    first = layer.bank.weights["w_in"][0].clone()
    layer.request("cancel", [0])
    layer.request("replant", [0])
    layer.request("germinate", [0])
    assert not torch.equal(layer.bank.weights["w_in"][0], first)


def test_an_unknown_action_names_the_known_ones(layer: ChunkedKasminaLayer) -> None:
    with pytest.raises(ConfigError, match="no action is named 'water'") as caught:
        layer.request("water", [0])
    assert all(action in caught.value.hint for action in ACTIONS)
    assert states(layer) == [S.DORMANT] * SEEDS


def test_subscribers_hear_of_applied_rows_after_the_change(layer: ChunkedKasminaLayer) -> None:
    heard: list[tuple[list[int], list[S]]] = []

    def tell(batch: TransitionBatch) -> None:
        heard.append((batch.seed_ids.tolist(), states(layer)))

    layer.subscribe(tell)
    layer.apply_transitions(transitions([2, 3], [S.DORMANT, S.TRAINING], [S.GERMINATED, S.CULLED]))
    assert heard == [([2], [S.DORMANT, S.DORMANT, S.GERMINATED, S.DORMANT])]
    layer.apply_transitions(transitions([3], S.TRAINING, S.CULLED))
    assert len(heard) == 1  # nothing was applied


def test_a_subscriber_that_fails_undoes_nothing(layer: ChunkedKasminaLayer) -> None:
    def fail(_: TransitionBatch) -> None:
        raise RuntimeError("not my day")

    layer.subscribe(fail)
    with pytest.raises(RuntimeError, match="not my day"):
        layer.request("germinate", [1])
    assert states(layer)[1] is S.GERMINATED


def test_chunks_may_have_sizes_of_the_users_choice() -> None:
    layer = ChunkedKasminaLayer(nn.Linear(6, 12), 3, hidden=3, chunk_sizes=[1, 8, 3])
    assert [layer.seed(i).bounds for i in range(3)] == [(0, 1), (1, 9), (9, 12)]
    walk(layer, [1], S.STABILIZATION)
    with torch.no_grad():
        layer.bank.weights["b_out"][1] = 1.0
    x = torch.randn(5, 6)
    moved = (layer(x) != layer.base_layer(x)).any(0).tolist()
    assert moved == [1 <= column < 9 for column in range(12)]
