"""The judgement of moves inside a Triton kernel, in the order of `seeds.ExtendedStateTensor`."""

from __future__ import annotations

import triton
import triton.language as tl

from esper_ray.lifecycle import (
    BLENDED_STATES,
    LAST_GENERATION,
    RENEWABLE,
    TERMINAL_STATES,
    Cause,
    ExtendedLifecycle,
    Refusal,
)


def _bits(states):
    return sum(1 << int(state) for state in states)


_S, _R = ExtendedLifecycle, Refusal

# Handed to a launch as one value: Triton compares each global that a kernel reads at every launch,
# which cost the host more than half a microsecond apiece.
STATES = (
    len(_S),
    int(_S.GERMINATED),
    int(_S.TRAINING),
    int(_S.GRAFTING),
    int(min(TERMINAL_STATES)),
    _bits(BLENDED_STATES),
    _bits((_S.DORMANT, _S.CULLED, _S.CANCELLED)),
    _bits(RENEWABLE.nonzero()[0]),
    LAST_GENERATION,
    len(Cause),
    int(Cause.REPLANT),
)
"""Numbers and sets of states, as a kernel is compiled with them."""
REFUSALS = tuple(
    int(code)
    for code in (
        _R.STALE_GENERATION,
        _R.STALE_STATE,
        _R.UNKNOWN_STATE,
        _R.TERMINAL,
        _R.NOT_IN_TABLE,
        _R.GENERATIONS_USED_UP,
        _R.UNKNOWN_STRATEGY,
        _R.UNKNOWN_CAUSE,
        _R.NO_BLUEPRINT,
    )
)
"""Codes of the checks, in their order."""


@triton.jit
def among(SET: tl.constexpr, code):
    """Whether each code is in a set of STATES."""
    return ((tl.full(code.shape, SET, tl.int32) >> code) & 1) != 0


@triton.jit
def refusal(state, generation, own, target, expected, aged, cause, blueprint, strategy, MOVES, m,
            STATES: tl.constexpr, REFUSALS: tl.constexpr, STRATEGIES: tl.constexpr):  # fmt: skip
    """Refusal code of each move, and which of them renew their row."""
    IS_TERMINAL: tl.constexpr = REFUSALS[3]
    NOT_IN_TABLE: tl.constexpr = REFUSALS[4]
    valid = (target >= 0) & (target < STATES[0])
    sane = m & (state >= 0) & (state < STATES[0])
    to = tl.where(valid, target, 0)
    move = tl.load(MOVES + state * STATES[0] + to, mask=sane, other=NOT_IN_TABLE).to(tl.int32)
    anew = (cause == STATES[10]) & (target == 0)
    renewable = sane & among(STATES[7], tl.where(sane, state, 0))
    illegal = tl.where(anew, renewable == 0, move == NOT_IN_TABLE)
    bare = (state == STATES[1]) & (target == STATES[2]) & (own < 0) & (blueprint < 0)
    reason = tl.where(bare, REFUSALS[8], 0)  # the last check first: earlier ones go over it
    reason = tl.where((cause < 0) | (cause >= STATES[9]), REFUSALS[7], reason)
    reason = tl.where((strategy < -1) | (strategy >= STRATEGIES), REFUSALS[6], reason)
    reason = tl.where(anew & (generation == STATES[8]), REFUSALS[5], reason)
    reason = tl.where(illegal, NOT_IN_TABLE, reason)
    reason = tl.where((move == IS_TERMINAL) & (anew == 0), IS_TERMINAL, reason)
    reason = tl.where(valid == 0, REFUSALS[2], reason)
    reason = tl.where(state != expected, REFUSALS[1], reason)
    return tl.where(generation != aged, REFUSALS[0], reason), anew
