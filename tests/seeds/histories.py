"""Random histories of a few seeds: what happens to them, drawn as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from hypothesis import strategies as st

from esper_ray.events import GraftingSignals, MetricsBatch, TransitionBatch
from esper_ray.grafting import GraftingSettings, SelectorSettings
from esper_ray.lifecycle import TERMINAL_STATES, Cause, StateTransition
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.seeds import ExtendedStateTensor
from tests.builders import PATHS, metrics, same_bits, signals, transitions

SEEDS: Final = 5
FIXED: Final = GraftingSettings(ramp_epochs=3, pause_epochs=2, check_every=2)
SWITCHING: Final = GraftingSettings(
    ramp_epochs=6,
    pause_epochs=2,
    check_every=2,
    selection=SelectorSettings("performance", cooldown_epochs=1, improving_epochs=1),
)
MEASURES: Final = tuple(GraftingSignals.__dataclass_fields__)[1:]
Mode = Literal["all", "report"]


@dataclass(frozen=True)
class Ask:
    """A move of one seed: its `way`-th legal one, unless `slip` names what is wrong with it."""

    seed_id: int
    way: int
    slip: str
    cause: int
    blueprint: int
    strategy: int
    checkpoint: int


@dataclass(frozen=True)
class Moves:
    """A transition batch, made for the state that it meets."""

    asks: tuple[Ask, ...]
    mode: Mode
    epoch: int


@dataclass(frozen=True)
class Epoch:
    """Errors of every seed in an epoch, and what its strategy would read at its end."""

    errors: tuple[int, ...]
    measures: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Measured:
    """(seed id, four metrics, valid bits, score) of some seeds."""

    rows: tuple[tuple[int, tuple[float, ...], int, float], ...]


@dataclass(frozen=True)
class Failures:
    """Errors of every seed, counted amid an epoch."""

    errors: tuple[int, ...]


Happening = Moves | Epoch | Measured | Failures

nan, inf = float("nan"), float("inf")
_SLIPS = ("generation", "state", "target", "strategy", "seed")
asks = st.builds(
    Ask,
    seed_id=st.integers(0, SEEDS - 1),
    way=st.sampled_from([0, 0, 0, 1, 2, 3]),
    slip=st.sampled_from(["", "", "", "", "", "", *_SLIPS]),
    cause=st.integers(0, 4),
    blueprint=st.integers(-1, 3),
    strategy=st.integers(-1, 4),
    checkpoint=st.integers(-1, 99),
)
moves = st.builds(
    Moves,
    asks=st.lists(asks, max_size=6).map(tuple),
    mode=st.sampled_from(["report", "report", "all"]),
    epoch=st.integers(0, 2**31 - 1),
)
epochs = st.builds(
    Epoch,
    errors=st.tuples(*[st.sampled_from([0, 0, 1, 3])] * SEEDS),
    measures=st.tuples(
        *[
            st.tuples(
                st.sampled_from([0.0, 0.006, 0.02, nan, inf]),
                st.sampled_from([0.0, 0.02, -0.3, nan, -inf]),
                st.sampled_from([0.05, 0.2, nan]),
                st.sampled_from([1.0, 20.0, nan]),
                st.sampled_from([0.0, 0.1, nan]),
            )
        ]
        * SEEDS
    ),
)
failures = st.builds(Failures, st.tuples(*[st.sampled_from([0, 1])] * SEEDS))
number = st.sampled_from([0.0, -0.0, 0.65, -0.0005, 1e6, 3e38, -3e38, nan, inf, -inf])
measured = st.builds(
    Measured,
    st.lists(
        st.tuples(
            st.sampled_from([*range(SEEDS)] * 3 + [-1, SEEDS, -(2**40)]),
            st.tuples(*[st.one_of(st.floats(-8, 8, width=32), number)] * 4),
            st.integers(0, 15),
            number,
        ),
        max_size=4,
    ).map(tuple),
)
starts = st.lists(st.sampled_from(list(S)), min_size=SEEDS, max_size=SEEDS)
histories = st.lists(st.one_of(moves, moves, epochs, measured, failures), max_size=14)


def road(to: Sequence[S]) -> Iterator[TransitionBatch]:
    """Batches that lead seed i from DORMANT to `to[i]`, grafting by strategy i % 5."""
    for step in range(1, max(len(PATHS[state]) for state in to)):
        ids = [i for i, state in enumerate(to) if len(PATHS[state]) > step]
        yield transitions(
            ids,
            [PATHS[to[i]][step - 1] for i in ids],
            [PATHS[to[i]][step] for i in ids],
            blueprint_id=0 if step == 1 else -1,
            strategy=[i % 5 if step == 1 else -1 for i in ids],
            epoch=step,
        )


def batch_of(drawn: Moves, state: ExtendedStateTensor) -> TransitionBatch:
    """The batch that `drawn` means for the present rows."""
    table = [_move(ask, state) for ask in drawn.asks]
    columns: Any = zip(*table, strict=True) if table else [[]] * 5
    ids, expected, generation, target, cause = (list(column) for column in columns)
    return transitions(
        ids,
        expected,
        target,
        generation=generation,
        cause=cause,
        blueprint_id=[ask.blueprint for ask in drawn.asks],
        strategy=[_strategy(ask) for ask in drawn.asks],
        checkpoint_id=[ask.checkpoint for ask in drawn.asks],
        epoch=drawn.epoch,
    )


def _move(ask: Ask, state: ExtendedStateTensor) -> tuple[int, int, int, int, int]:
    """(seed id, expected state, expected generation, target, cause)"""
    code, way = int(state.lifecycle_state[ask.seed_id]), ask.way
    generation = int(state.generation[ask.seed_id])
    ways = StateTransition.VALID_TRANSITIONS[S(code)] or (S.DORMANT,)
    target = int(ways[way % len(ways)])
    cause = int(Cause.REPLANT) if code in TERMINAL_STATES else ask.cause
    match ask.slip:
        case "seed":
            return (-1, SEEDS, 2**40, -(2**40))[way], code, generation, target, cause
        case "state":
            return ask.seed_id, (99, -1, code + 1, code - 1)[way], generation, target, cause
        case "generation":
            return ask.seed_id, code, (generation + 1) % 2**15, target, cause
        case "target":
            return ask.seed_id, code, generation, (99, -1, 11, S.DORMANT)[way], ask.cause
        case _:
            return ask.seed_id, code, generation, target, cause


def _strategy(ask: Ask) -> int:
    return (5, 77, -2, 127)[ask.way] if ask.slip == "strategy" else ask.strategy


def signals_of(drawn: Epoch, state: ExtendedStateTensor) -> GraftingSignals:
    """What the strategies of the present GRAFTING rows read."""
    ids = [i for i in range(SEEDS) if int(state.lifecycle_state[i]) == S.GRAFTING]
    columns = {name: [drawn.measures[i][place] for i in ids] for place, name in enumerate(MEASURES)}
    return signals(ids, **columns)


def metrics_of(drawn: Measured) -> MetricsBatch:
    """The batch of measured metrics."""
    return metrics(
        [row[0] for row in drawn.rows],
        [row[1] for row in drawn.rows] or None,
        valid=[row[2] for row in drawn.rows],
        score=[row[3] for row in drawn.rows],
    )


def happen(state: ExtendedStateTensor, drawn: Happening, settings: GraftingSettings) -> list[int]:
    """Do to a tensor what was drawn; reason codes of the rows, if it has any."""
    match drawn:
        case Moves():
            _, reason = state.compare_and_set(batch_of(drawn, state), drawn.mode)
            return [int(code) for code in reason]
        case Measured():
            return [int(code) for code in state.record(metrics_of(drawn))]
        case Epoch():
            state.count_errors(torch.tensor(drawn.errors))
            state.advance(signals_of(drawn, state), settings)
        case Failures():
            state.count_errors(torch.tensor(drawn.errors))
    return []


def begin(state: ExtendedStateTensor, to: Sequence[S]) -> None:
    """Lead the seeds of a new tensor to their first states."""
    for batch in road(to):
        assert state.compare_and_set(batch)[0].all()


def same_state(one: ExtendedStateTensor, other: ExtendedStateTensor) -> bool:
    """Whether all buffers and all that grafting remembers agree to the bit."""
    names = [name for name, _ in one.named_buffers()]
    return (
        names == [name for name, _ in other.named_buffers()]
        and all(same_bits(one.get_buffer(n), other.get_buffer(n)) for n in names)
        and _bytes(one) == _bytes(other)
    )


def _bytes(state: ExtendedStateTensor) -> dict[str, tuple[str, bytes]]:
    return {n: (str(a.dtype), a.tobytes()) for n, a in state.grafting.arrays().items()}


def history_of(state: ExtendedStateTensor, seed_id: int) -> list[tuple[int, ...]]:
    """Valid entries of one seed, oldest first."""
    count = int(state.transition_count[seed_id])
    slots = [slot % 10 for slot in range(max(0, count - 10), count)]
    return [tuple(state.transition_history[seed_id, slot].tolist()) for slot in slots]
