"""Every order of events of the batch protocol, within bounds; see `model.py` and `invariants.py`.

Seeds start in generation 1 where late telemetry still speaks of generation 0. Messages may be
lost any number of times. Budgets: batches, coordinator crashes, layer crashes, copies, commits.

| scenario | budget | states | steps | depth |
|---|---|---|---|---|
| both ends crash | 2 1 1 0 0 | 78,395 | 488,740 | 25 |
| the coordinator crashes, a message comes twice | 2 1 0 1 0 | 20,096 | 144,356 | 22 |
| a run commit and a rewind | 2 0 1 0 1 | 85,043 | 562,217 | 25 |
| two seeds, one of everything | 1 1 1 1 1 | 17,610 | 82,838 | 17 |
| both ends crash twice | 1 2 2 1 1 | 60,009 | 301,008 | 21 |
| three batches: to CANCELLED, replanted, on | 3 0 0 0 0 | 26,881 | 235,346 | 30 |
| a policy that ignores the table | 1 0 0 0 0 | 141 | 436 | 10 |
"""

from __future__ import annotations

from functools import partial

import pytest

from esper_ray.lifecycle import ExtendedLifecycle
from tests.model import planted
from tests.model.invariants import at_rest, breach
from tests.model.model import Model, Scenario
from tests.model.planted import with_inbox, with_ledger
from tests.model.search import Found, search
from tests.model.world import Budget, Row

_S = ExtendedLifecycle
LIMIT = 100_000
THREE = frozenset({_S.DORMANT, _S.GERMINATED, _S.CANCELLED})
SEED = Row(_S.GERMINATED, 1)
FRESH = Row(_S.DORMANT, 0)
LATE = ((0, Row(_S.GERMINATED, 0)),)

CRASHES = Scenario((SEED,), LATE, THREE, Budget(2, 1, 1, 0, 0))
COPIES = Scenario((SEED,), LATE, THREE, Budget(2, 1, 0, 1, 0))
COMMIT = Scenario((SEED,), LATE, THREE, Budget(2, 0, 1, 0, 1))
TWO_SEEDS = Scenario((SEED, FRESH), LATE, THREE, Budget(1, 1, 1, 1, 1))
TWICE = Scenario((SEED,), LATE, THREE, Budget(1, 2, 2, 1, 1))
BATCHES = Scenario((SEED,), (), THREE, Budget(3, 0, 0, 0, 0))
ONE_BATCH = Scenario((SEED,), LATE, THREE, Budget(1, 0, 0, 0, 0))


def explore(model: Model) -> Found:
    """The whole space of a model; an error if it is larger than the limit."""
    rows = model.scenario.rows
    return search(model.start(), model.steps, partial(breach, rows), partial(at_rest, rows), LIMIT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "size"),
    [
        pytest.param(CRASHES, Found(78_395, 488_740, 25), id="both-crash"),
        pytest.param(COPIES, Found(20_096, 144_356, 22), id="copies"),
        pytest.param(COMMIT, Found(85_043, 562_217, 25), id="commit-and-rewind"),
        pytest.param(TWO_SEEDS, Found(17_610, 82_838, 17), id="two-seeds"),
        pytest.param(TWICE, Found(60_009, 301_008, 21), id="crash-twice"),
        pytest.param(BATCHES, Found(26_881, 235_346, 30), id="three-batches"),
    ],
)
def test_the_protocol_holds_in_every_state(scenario: Scenario, size: Found) -> None:
    found = explore(Model(scenario))
    assert found == size, str(found)


def test_the_layer_refuses_what_a_policy_proposes_against_the_table() -> None:
    found = explore(planted.PolicyProposesAnything(ONE_BATCH))
    assert found == Found(141, 436, 10), str(found)


@pytest.mark.parametrize(
    ("bug", "scenario", "length", "invariants"),
    [
        (planted.CompareAndSetIgnoresGeneration, CRASHES, 4, "I2"),
        (planted.CompareAndSetIgnoresState, CRASHES, 10, "I2"),
        (planted.CompareAndSetIgnoresTable, ONE_BATCH, 4, "I5"),
        (with_inbox(planted.AcceptsAnyRunEpoch), CRASHES, 6, "I4"),
        (with_inbox(planted.AcceptsOlderTerms), COPIES, 9, "I7"),
        (with_inbox(planted.KeepsBatchesOfOlderTerms), COPIES, 9, "I7"),
        (with_inbox(planted.AcceptsUsedNumbers), COPIES, 9, "I1"),
        (with_inbox(planted.UsesNumberWhenApplied), COMMIT, 10, "I1"),
        (with_inbox(planted.AcknowledgesByNumber), COMMIT, 12, "I1"),
        (with_ledger(planted.LogsRepeats), COPIES, 8, "I1"),
        (with_ledger(planted.LogsAnyRunEpoch), TWO_SEEDS, 9, "I1"),
        (with_ledger(planted.IssuesWhileInFlight), COPIES, 7, "I7"),
        (with_ledger(planted.NumbersFromOneAfterRestart), TWO_SEEDS, 10, "I1"),
        (with_ledger(planted.GoesOnFromTheLogAfterRestart), COPIES, 9, "I7"),
        (planted.AcknowledgesBeforeAppend, COPIES, 5, "I3"),
        (planted.LogsOnlyWhatApplied, COPIES, 6, "I3"),
        (planted.CommitsWithAReceiptOutstanding, COMMIT, 6, "I4"),
        (planted.CommitsTheEndOfTheLog, COMMIT, 8, "I4"),
        (planted.CommitsWhatAnOlderRunEpochStaged, COMMIT, 14, "I4"),
        (planted.AppendsAfterARewind, COMMIT, 8, "I7"),
        (planted.NeverSendsABatchAgain, ONE_BATCH, 2, "fair steps"),
        (planted.NeverSendsAReceiptAgain, ONE_BATCH, 7, "fair steps"),
    ],
)
def test_a_planted_bug_is_found_by_its_shortest_trace(
    bug: type[Model], scenario: Scenario, length: int, invariants: str
) -> None:
    found = explore(bug(scenario))
    assert found.wrong.startswith(invariants), str(found)
    assert len(found.trace) == length, str(found)
