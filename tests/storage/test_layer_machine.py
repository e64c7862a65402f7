"""Any order of saves, failures, restarts and zombies: what was acknowledged is what is restored."""

from __future__ import annotations

import contextlib
import time

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from esper_ray.errors import CheckpointNotFound, EsperError, FencedError
from esper_ray.storage import CheckpointId, CheckpointManager, Rows, SaveFuture, ShardId
from esper_ray.storage.group_commit import CommitPolicy
from esper_ray.storage.layer_rows import newest
from tests.storage.layer_cases import LAYER, SCHEMA, FaultyRoot, blueprint, rows_of, same

SEEDS = 12


class LayerMachine(RuleBasedStateMachine):
    """One shard's log over a store that fails now and then, its writer and those it replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.root = FaultyRoot.new()
        self.number = 0
        self.seeds: dict[CheckpointId, int] = {}
        self.layers: list[tuple[Rows, SaveFuture]] = []
        self.manager = self.open()

    def open(self) -> CheckpointManager:
        self.root.refusals = 0
        return CheckpointManager(
            self.root,
            layer_id=LAYER,
            schema=SCHEMA,
            shard=ShardId.whole(SEEDS),
            policy=CommitPolicy(interval_s=0.0, retry_s=0.0),
        )

    @rule(seed=st.integers(0, SEEDS - 1), weights=st.booleans())
    def save_seed(self, seed: int, weights: bool) -> None:
        self.number += 1
        tensors = blueprint(float(self.number)) if weights else None
        with contextlib.suppress(EsperError):  # of an earlier save, raised once
            saved = self.manager.save_checkpoint(LAYER, seed, {"lifecycle": self.number}, tensors)
            self.seeds[saved] = self.number

    @rule(ids=st.sets(st.integers(0, SEEDS - 1), min_size=1), everyone=st.booleans())
    def save_layer(self, ids: set[int], everyone: bool) -> None:
        self.number += 1
        rows = rows_of(range(SEEDS) if everyone else sorted(ids), seed=self.number)
        with contextlib.suppress(EsperError):
            future = self.manager.save_layer(rows, step=self.number)
            self.layers.append((rows, future))

    @rule(times=st.integers(1, 4))
    def let_the_store_fail(self, times: int) -> None:
        self.root.refusals = times

    @rule()
    def flush(self) -> None:
        with contextlib.suppress(EsperError):
            self.manager.flush(timeout=20)

    @rule()
    def restart(self) -> None:
        self._drain()
        with contextlib.suppress(EsperError):
            self.manager.close()
        self.manager = self.open()

    @rule()
    def replace_a_living_writer(self) -> None:
        self._drain()
        zombie, self.manager = self.manager, self.open()
        with contextlib.suppress(EsperError):
            zombie.flush()
        with pytest.raises(FencedError):
            zombie.save_layer(rows_of(range(SEEDS)), step=0).wait(timeout=20)
        with pytest.raises(FencedError):
            zombie.save_checkpoint(LAYER, 0, {})
        with pytest.raises(FencedError):
            zombie.close()

    @rule()
    def what_was_saved_is_restored(self) -> None:
        self._drain()
        reader = CheckpointManager(self.root, layer_id=LAYER)
        for saved, number in list(self.seeds.items())[-5:]:
            assert saved.future is not None
            assert saved.future.level == "durable-object"
            found = reader.restore_checkpoint(saved, "cpu")
            assert found["state_data"]["lifecycle"] == number
        stored = [rows for rows, future in self.layers if future.level == "durable-object"]
        if not stored:
            with pytest.raises(CheckpointNotFound):
                reader.restore_layer()
            return
        full = max(n for n, rows in enumerate(stored) if len(rows) == SEEDS)
        expected, one = newest(stored[full:]), np.array([self.number % SEEDS])
        assert same(reader.restore_layer(), expected)
        assert same(reader.restore_layer(seed_ids=one), expected.keep(one))
        seqs = reader.reader.seqs(1, 0)
        assert seqs == list(range(1, len(seqs) + 1))

    def _drain(self) -> None:
        """Let the store get everything: what it refuses now and then, it takes in the end."""
        deadline = time.monotonic() + 20
        while self.manager.stats()["pending"]:
            with contextlib.suppress(EsperError):
                self.manager.flush("accepted")
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def teardown(self) -> None:
        self.what_was_saved_is_restored()
        with contextlib.suppress(EsperError):
            self.manager.close()


TestLayerMachine = LayerMachine.TestCase
TestLayerMachine.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
