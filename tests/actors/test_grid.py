"""Which actor is which, and a layer's messages in parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_ray.actors.grid import Grid
from esper_ray.actors.sharding import merged_receipt, split_rows
from esper_ray.events.messages import MetricsBatch, TransitionReceipt

GRIDS = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(lambda shards: Grid((*shards,)))


@given(GRIDS)
def test_every_actor_has_one_place_and_hears_each_neighbour_once(grid: Grid) -> None:
    places = [grid.place(rank) for rank in range(grid.world)]
    assert [grid.rank(stage, shard.index) for stage, shard in places] == list(range(grid.world))
    for rank, (stage, shard) in enumerate(places):
        assert shard.count == grid.shards[stage]
        for other in {stage - 1, stage + 1} & set(range(len(grid.shards))):
            assert rank in grid.hearers(grid.source(rank, other), stage)
            heard = [one for one in grid.ranks(other) if rank in grid.hearers(one, stage)]
            assert heard == [grid.source(rank, other)]


def test_an_actor_that_is_not_there_has_no_place() -> None:
    with pytest.raises(IndexError, match="there are 3 actors"):
        Grid((1, 2)).place(3)


@given(st.data())
def test_rows_in_parts_come_back_in_their_order(data: st.DataObject) -> None:
    seeds = data.draw(st.integers(1, 40))
    shards = data.draw(st.integers(1, min(seeds, 5)))
    ids = np.array(data.draw(st.permutations(range(seeds)))[: data.draw(st.integers(0, seeds))])
    ids = ids.astype(np.int64)
    score = ids.astype(np.float32) + 0.5
    blank: Any = np.zeros((len(ids), 4), np.float32)
    batch = MetricsBatch("layer", ids, blank, np.zeros(len(ids), np.uint8), score)
    parts = split_rows(batch, seeds, shards)
    bounds = [k * seeds // shards for k in range(shards + 1)]
    for part, first, last in zip(parts, bounds, bounds[1:], strict=False):
        assert ((part.seed_ids >= 0) & (part.seed_ids < last - first)).all()
        assert np.array_equal(part.score, part.seed_ids + first + 0.5)
    receipts = [
        TransitionReceipt("layer", 1, 8, part.score > seeds / 2, part.score.astype(np.uint8))
        for part in parts
    ]
    merged = merged_receipt(ids, seeds, receipts)
    assert np.array_equal(merged.applied, score > seeds / 2)
    assert np.array_equal(merged.reason, score.astype(np.uint8))
