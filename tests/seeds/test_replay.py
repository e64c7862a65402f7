"""The log of a layer folds back into its state, bit for bit; a log with a hole does not pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_ray.actors.journal import Journal
from esper_ray.errors import CorruptError
from esper_ray.events import TransitionBatch
from esper_ray.events.log import EventKind, Events, decode, encode
from esper_ray.grafting import GraftingSettings
from esper_ray.lifecycle import Cause, LifecycleManager, Refusal, Requests
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.seeds import ExtendedStateTensor
from esper_ray.seeds.replay import replay
from tests.builders import same_bits, telemetry, transitions
from tests.seeds.histories import (
    FIXED,
    SEEDS,
    SWITCHING,
    Epoch,
    Failures,
    Happening,
    Measured,
    Moves,
    batch_of,
    histories,
    metrics_of,
    road,
    signals_of,
    starts,
)

SLOW = replace(FIXED, ramp_epochs=20)
QUIET = Epoch((0,) * SEEDS, ((0.0, 0.0, 0.05, 1.0, 0.0),) * SEEDS)


class LoggedLayer:
    """A live tensor, and a journal of what is done to it."""

    def __init__(self, rules: GraftingSettings, name: str, journal: Journal) -> None:
        self.state, self.rules = ExtendedStateTensor(SEEDS), rules
        self.name, self.journal = name, journal
        self.epoch = -1

    def happen(self, drawn: Happening) -> None:
        match drawn:
            case Moves():
                self.move(batch_of(drawn, self.state))
            case Epoch():
                self.end_epoch(drawn)
            case Measured():
                batch = replace(metrics_of(drawn), layer_id=self.name)
                known = self.state.record(batch) != Refusal.UNKNOWN_SEED
                if known.any():
                    good = {n: getattr(batch, n)[known] for n in METRIC_COLUMNS}
                    self.journal.metrics(replace(batch, **good), self.epoch, step=1)
            case Failures():
                self.end_epoch(replace(QUIET, errors=drawn.errors))

    def end_epoch(self, drawn: Epoch) -> None:
        self.epoch += 1
        errors, read = torch.tensor(drawn.errors), signals_of(drawn, self.state)
        self.state.count_errors(errors)
        self.state.advance(read, self.rules)
        view = self.state.view()
        told = telemetry(
            [S(code) for code in view.state.tolist()],
            layer_id=self.name,
            epoch=self.epoch,
            alpha=view.alpha,
            errors=errors.numpy().astype(np.int32),
            signals=read,
        )
        self.journal.epoch(told, step=self.epoch)

    def move(self, batch: TransitionBatch) -> None:
        batch = replace(batch, layer_id=self.name, epoch=self.epoch)
        applied, reason = self.state.compare_and_set(batch)
        told = reason != Refusal.UNKNOWN_SEED
        decided = LifecycleManager().judge(asked_by(batch))
        decided = replace(decided, reason=reason)
        self.journal.refusals(decided.take(told), self.epoch, step=1)
        self.journal.moves(batch.take(applied), decided.take(applied), step=1)


METRIC_COLUMNS = ("seed_ids", "metrics", "valid", "score")


def asked_by(batch: TransitionBatch) -> Requests:
    nothing = np.zeros(len(batch.seed_ids), dtype=np.int32)
    return Requests(
        layer_id=batch.layer_id,
        seed_ids=batch.seed_ids,
        generation=batch.expected_generation,
        source=batch.expected_state,
        target=batch.target,
        cause=batch.cause,
        epochs_in_state=nothing,
        error_count=nothing,
        metrics={},
    )


def same_rows(one: ExtendedStateTensor, other: ExtendedStateTensor) -> bool:
    names = [name for name, _ in one.named_buffers()]
    return all(same_bits(one.get_buffer(name), other.get_buffer(name)) for name in names) and (
        one.grafting.seed_ids.tolist() == other.grafting.seed_ids.tolist()
    )


@settings(max_examples=40, deadline=None)
@given(to=starts, drawn=histories, rules=st.sampled_from([FIXED, SWITCHING]))
def test_a_stored_log_folds_back_into_the_live_state_bit_for_bit(
    to: list[S], drawn: list[Happening], rules: GraftingSettings
) -> None:
    journal = Journal(0)
    one, other = (LoggedLayer(rules, name, journal) for name in ("one", "other"))
    for batch in road(to):
        for layer in (one, other):
            layer.move(batch)
            layer.end_epoch(QUIET)
    for happening in drawn:
        one.happen(happening)
        other.happen(QUIET)
        other.happen(happening)
    events = decode(encode(journal.drain()))
    for layer in (one, other):
        assert same_rows(replay(events, layer.name, SEEDS, rules), layer.state)


def test_all_five_strategies_are_replayed() -> None:
    layer = logged()
    strategies = layer.state.columns[layer.state.GRAFTING_STRATEGY].tolist()
    assert strategies == [0, 1, 2, 3, 4]
    assert same_rows(replay(layer.journal.drain(), "layer", SEEDS, SLOW), layer.state)
    assert len(set(layer.state.alpha.tolist())) > 2


def test_a_layer_without_events_has_newborn_seeds() -> None:
    assert same_rows(replay(Events.empty(), "layer", 3, SLOW), ExtendedStateTensor(3))
    assert same_rows(replay(logged().journal.drain(), "another", 3, SLOW), ExtendedStateTensor(3))


# ---- logs that do not fit --------------------------------------------------------------------


def logged() -> LoggedLayer:
    """All seeds go into GRAFTING, each by its own strategy, with an epoch after each move."""
    layer = LoggedLayer(SLOW, "layer", Journal(0))
    wild = replace(QUIET, measures=((0.02, 0.02, 0.2, 20.0, 0.0),) * SEEDS)
    for batch in road([S.GRAFTING] * SEEDS):
        layer.move(batch)
        layer.end_epoch(QUIET)
    layer.end_epoch(wild)
    layer.end_epoch(replace(QUIET, errors=(1, 0, 0, 0, 2)))
    for source, target in ((S.GRAFTING, S.ROLLED_BACK), (S.ROLLED_BACK, S.DORMANT)):
        layer.move(transitions([1], source, target, cause=Cause.REPLANT))
        layer.end_epoch(QUIET)
    layer.move(transitions([1], S.DORMANT, S.GERMINATED, generation=1, strategy=1))
    return layer


LOG = logged().journal.drain()
PLACE = np.unique(LOG.columns["sequence"], return_inverse=True)[1]  # what was done first, second
# The very last event may be missing: the log could have ended before it.
NEEDED = np.flatnonzero(~np.isin(LOG.columns["kind"], [EventKind.ERRORS, EventKind.METRICS]))[:-1]


@pytest.mark.parametrize("row", NEEDED)
def test_a_log_without_one_of_its_events_is_corrupt(row: int) -> None:
    with pytest.raises(CorruptError, match="the log of 'layer' does not fit at epoch"):
        replay(LOG.take(np.arange(len(LOG)) != row), "layer", SEEDS, SLOW)


@pytest.mark.parametrize("first", range(PLACE.max()))
def test_a_log_with_two_things_in_the_wrong_order_is_corrupt(first: int) -> None:
    order = np.arange(PLACE.max() + 1)
    order[[first, first + 1]] = first + 1, first
    swapped = LOG.take(np.argsort(order[PLACE], kind="stable"))
    sequence = np.sort(order[PLACE]).astype(np.uint64)
    events = decode(encode(Events({**swapped.columns, "sequence": sequence})))
    with pytest.raises(CorruptError, match="the log of 'layer' does not fit at epoch"):
        replay(events, "layer", SEEDS, SLOW)


def changed(which: EventKind, **values: int | str) -> Events:
    """The log with other values in every event of one kind."""
    rows = LOG.columns["kind"] == which
    columns = dict(LOG.columns)
    for name, value in values.items():
        column = columns[name]
        if isinstance(column, list):
            columns[name] = [value if at else old for old, at in zip(column, rows, strict=True)]
        else:
            columns[name] = np.where(rows, value, column).astype(column.dtype)
    return Events(columns)


STRAY = changed(EventKind.SIGNALS, epoch=-1).take(LOG.columns["kind"] == EventKind.SIGNALS)


@pytest.mark.parametrize(
    ("events", "problem"),
    [
        (changed(EventKind.EPOCH, errors=SEEDS + 1), r"epoch 0: it is of \[6\] seeds, not 5"),
        (changed(EventKind.ERRORS, seed_id=SEEDS), "errors of a seed that does not exist"),
        (changed(EventKind.ERRORS, seed_id=-1), "errors of a seed that does not exist"),
        (changed(EventKind.SIGNALS, seed_id=2), "signals are not those of the seeds in GRAFTING"),
        (changed(EventKind.TRANSITION, cause="WHIM"), "no cause is named 'WHIM'"),
        (changed(EventKind.TRANSITION, to_state=99), "cannot have moved"),
        (changed(EventKind.TRANSITION, strategy=77), "cannot have moved"),
        (changed(EventKind.REPLANT, generation=5), r"epoch \d+: seeds \[1\] cannot have moved"),
        (changed(EventKind.REPLANT, epoch=77), "an event is of epoch 77"),
        (STRAY, "epoch -1: the end of an epoch is missing"),
    ],
)
def test_a_log_that_tells_the_impossible_is_corrupt(events: Events, problem: str) -> None:
    with pytest.raises(CorruptError, match=problem):
        replay(events, "layer", SEEDS, SLOW)


def test_a_log_of_another_number_of_seeds_is_corrupt() -> None:
    with pytest.raises(CorruptError, match=r"of \[5\] seeds, not 6"):
        replay(LOG, "layer", 6, SLOW)
    with pytest.raises(CorruptError, match=r"seeds \[4\] cannot have moved"):
        replay(LOG, "layer", 4, SLOW)
