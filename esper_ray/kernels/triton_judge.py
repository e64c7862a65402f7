"""The judgement of moves inside a Triton kernel, in the order of `seeds.ExtendedStateTensor`."""

from __future__ import annotations

import triton
import triton.language as tl

from esper_ray.lifecycle import LAST_GENERATION, RENEWABLE, Cause, ExtendedLifecycle, Refusal


def bits(states):
    """A set of states as a number that a kernel is compiled with."""
    return tl.constexpr(sum(1 << int(state) for state in states))


_S = ExtendedLifecycle
_STATES = tl.constexpr(len(_S))
_CAUSES = tl.constexpr(len(Cause))
_REPLANT = tl.constexpr(int(Cause.REPLANT))
_GERMINATED = tl.constexpr(int(_S.GERMINATED))
_TRAINING = tl.constexpr(int(_S.TRAINING))
_RENEWABLE = bits(RENEWABLE.nonzero()[0])
_LAST_GENERATION = tl.constexpr(LAST_GENERATION)
_STALE_GENERATION = tl.constexpr(int(Refusal.STALE_GENERATION))
_STALE_STATE = tl.constexpr(int(Refusal.STALE_STATE))
_UNKNOWN_STATE = tl.constexpr(int(Refusal.UNKNOWN_STATE))
_IS_TERMINAL = tl.constexpr(int(Refusal.TERMINAL))
_NOT_IN_TABLE = tl.constexpr(int(Refusal.NOT_IN_TABLE))
_GENERATIONS_USED_UP = tl.constexpr(int(Refusal.GENERATIONS_USED_UP))
_UNKNOWN_STRATEGY = tl.constexpr(int(Refusal.UNKNOWN_STRATEGY))
_UNKNOWN_CAUSE = tl.constexpr(int(Refusal.UNKNOWN_CAUSE))
_NO_BLUEPRINT = tl.constexpr(int(Refusal.NO_BLUEPRINT))
_STRATEGIES = tl.constexpr(5)  # in the order of kernels.tick.STRATEGIES


@triton.jit
def among(SET: tl.constexpr, code):
    """Whether each code is in a set made by `bits`."""
    return ((tl.full(code.shape, SET, tl.int32) >> code) & 1) != 0


@triton.jit
def refusal(state, generation, own, target, expected, aged, cause, blueprint, strategy, MOVES, m):
    """Refusal code of each move, and which of them renew their row."""
    valid = (target >= 0) & (target < _STATES)
    sane = m & (state >= 0) & (state < _STATES)
    to = tl.where(valid, target, 0)
    move = tl.load(MOVES + state * _STATES + to, mask=sane, other=_NOT_IN_TABLE).to(tl.int32)
    anew = (cause == _REPLANT) & (target == 0)
    renewable = sane & among(_RENEWABLE, tl.where(sane, state, 0))
    illegal = tl.where(anew, renewable == 0, move == _NOT_IN_TABLE)
    bare = (target == _TRAINING) & (state == _GERMINATED) & (own < 0) & (blueprint < 0)
    reason = tl.where(bare, _NO_BLUEPRINT, 0)  # the last check first: earlier ones go over it
    reason = tl.where((cause < 0) | (cause >= _CAUSES), _UNKNOWN_CAUSE, reason)
    strange = (strategy < -1) | (strategy >= _STRATEGIES)
    reason = tl.where(strange, _UNKNOWN_STRATEGY, reason)
    reason = tl.where(anew & (generation == _LAST_GENERATION), _GENERATIONS_USED_UP, reason)
    reason = tl.where(illegal, _NOT_IN_TABLE, reason)
    reason = tl.where((move == _IS_TERMINAL) & (anew == 0), _IS_TERMINAL, reason)
    reason = tl.where(valid == 0, _UNKNOWN_STATE, reason)
    reason = tl.where(state != expected, _STALE_STATE, reason)
    return tl.where(generation != aged, _STALE_GENERATION, reason), anew
