"""1F1B: what holds for every stage, and for all stages together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_ray.actors.schedule import Kind, Op, plan

STAGES = st.integers(1, 9)
PIECES = st.integers(1, 17)


@given(STAGES, PIECES, st.data())
def test_every_micro_batch_runs_once_each_way_in_ascending_order(
    stages: int, pieces: int, data: st.DataObject
) -> None:
    ops = plan(data.draw(st.integers(0, stages - 1)), stages, pieces)
    for kind in Kind:
        assert [op.micro_batch for op in ops if op.kind is kind] == list(range(pieces))
    assert len(ops) == 2 * pieces


@given(STAGES, PIECES, st.data())
def test_forward_comes_first_and_few_are_in_flight(
    stages: int, pieces: int, data: st.DataObject
) -> None:
    stage = data.draw(st.integers(0, stages - 1))
    in_flight, most = set[int](), 0
    for kind, piece in plan(stage, stages, pieces):
        if kind is Kind.FORWARD:
            in_flight.add(piece)
        else:
            in_flight.remove(piece)  # KeyError if it had not been forward
        most = max(most, len(in_flight))
    assert most == min(stages - stage, pieces)
    assert not in_flight


@given(STAGES, PIECES)
def test_stages_never_wait_for_each_other_in_a_circle(stages: int, pieces: int) -> None:
    left = [plan(stage, stages, pieces) for stage in range(stages)]
    done: set[tuple[int, Op]] = set()

    def ready(stage: int, op: Op) -> bool:
        neighbour = stage - 1 if op.kind is Kind.FORWARD else stage + 1
        return neighbour in (-1, stages) or (neighbour, op) in done

    ticks = 0
    while any(left):
        runnable = [s for s in range(stages) if left[s] and ready(s, left[s][0])]
        assert runnable, "deadlock"
        done |= {(stage, left[stage].pop(0)) for stage in runnable}
        ticks += 1
    assert ticks == 2 * (pieces + stages - 1)  # the bound of a pipeline with equal stages


def test_last_stage_turns_round_at_once() -> None:
    assert plan(1, 2, 2) == [
        Op(Kind.FORWARD, 0),
        Op(Kind.BACKWARD, 0),
        Op(Kind.FORWARD, 1),
        Op(Kind.BACKWARD, 1),
    ]


@pytest.mark.parametrize(
    ("stage", "stages", "pieces"), [(-1, 2, 1), (2, 2, 1), (0, 0, 1), (0, 1, 0)]
)
def test_impossible_schedule_is_refused(stage: int, stages: int, pieces: int) -> None:
    with pytest.raises(ValueError, match="no schedule"):
        plan(stage, stages, pieces)
