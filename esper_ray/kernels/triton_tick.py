"""Triton kernel of one tick of a layer's seeds: moves, history, epochs and alphas in one launch.

A thread holds a seed. The rules are those of `seeds.ExtendedStateTensor`, `grafting.strategies`
and `grafting.selector`, written once more: numpy says what is right, and tests hold the two to the
same bits. Alphas are computed in float64, each operation rounded as numpy rounds it: launch with
`enable_fp_fusion=False`, as a fused multiply-add would round once where numpy rounds twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from esper_ray.kernels.triton_judge import among, refusal


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")  # False for NaN too


@triton.jit
def _wide(VALUE: tl.constexpr):
    # Said here, as Triton 3.6 rounds a bare number to float32 before it compares.
    return tl.full((), VALUE, tl.float64)


@triton.jit
def _limited(alpha, held, most):
    """`grafting.base.limit_step`: NaN stays NaN."""
    low = tl.where(alpha < held, held, alpha)
    return tl.where(low > most, most, low)


@triton.jit(do_not_specialize=["N"])
def tick_kernel(COLUMNS, HISTORY, COUNT, METRICS, VALID, ALPHA, GENERATION, FLOATS, SHORTS, BYTES,
                ASKED, SIGNALS, REASON, MOVES, EPOCH, N, RULES: tl.constexpr,
                STATES: tl.constexpr, REFUSALS: tl.constexpr,
                MOVE: tl.constexpr, AGE: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """With MOVE, judge and make the moves in ASKED; with AGE, one lifecycle epoch after them.

    Shapes and the order of rows are those of `kernels.tick.Tick`; RULES are `kernels.tick.Rules`,
    STATES and REFUSALS those of triton_judge.
    """
    GRAFTING: tl.constexpr = STATES[3]
    INT16_MAX: tl.constexpr = 32_767
    UINT8_MAX: tl.constexpr = 255
    LINEAR: tl.constexpr = 0  # as in kernels.tick.STRATEGIES
    DRIFT: tl.constexpr = 1
    MOMENTUM: tl.constexpr = 2
    ADAPTIVE: tl.constexpr = 3
    STABILITY: tl.constexpr = 4
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = n < N
    # Everything a seed may need is asked for at once: the second of two loads that wait for one
    # another costs more than the bytes do.
    state = tl.load(COLUMNS + n, mask=m, other=0)
    own = tl.load(COLUMNS + N + n, mask=m, other=0)
    age = tl.load(COLUMNS + 2 * N + n, mask=m, other=0)
    strategy = tl.load(COLUMNS + 3 * N + n, mask=m, other=0)
    held = tl.load(ALPHA + n, mask=m, other=0.0)
    velocity = tl.load(FLOATS + n, mask=m, other=0.0)
    last = tl.load(FLOATS + N + n, mask=m, other=0.0)
    pause = tl.load(SHORTS + n, mask=m, other=0).to(tl.int32)
    paused = tl.load(SHORTS + N + n, mask=m, other=0).to(tl.int32)
    ramp = tl.load(SHORTS + 2 * N + n, mask=m, other=0).to(tl.int32)
    waited = tl.load(SHORTS + 3 * N + n, mask=m, other=0).to(tl.int32)
    bad = tl.load(BYTES + n, mask=m, other=0).to(tl.int32)
    streak = tl.load(BYTES + N + n, mask=m, other=0).to(tl.int32)
    limited = tl.load(BYTES + 2 * N + n, mask=m, other=0) != 0
    moved = n < 0
    born = n < 0
    if MOVE:
        target = tl.load(ASKED + n, mask=m, other=-1)
        expected = tl.load(ASKED + N + n, mask=m, other=0)
        aged = tl.load(ASKED + 2 * N + n, mask=m, other=0)
        cause = tl.load(ASKED + 3 * N + n, mask=m, other=0)
        blueprint = tl.load(ASKED + 4 * N + n, mask=m, other=-1)
        chosen = tl.load(ASKED + 5 * N + n, mask=m, other=-1)
        checkpoint = tl.load(ASKED + 6 * N + n, mask=m, other=-1)
        kept = tl.load(COLUMNS + 5 * N + n, mask=m, other=0)
        generation = tl.load(GENERATION + n, mask=m, other=0).to(tl.int32)
        count = tl.load(COUNT + n, mask=m, other=0).to(tl.int32)
        epoch = tl.load(EPOCH)
        asked = m & (target != -1)
        reason, anew = refusal(
            state, generation, own, target, expected, aged, cause, blueprint, chosen, MOVES, asked,
            STATES, REFUSALS, STABILITY + 1)  # fmt: skip
        moved = asked & (reason == 0)
        anew = anew & moved
        tl.store(REASON + n, tl.where(asked, reason, 0).to(tl.uint8), mask=m)
        tl.store(ASKED + n, tl.full([BN], -1, tl.int32), mask=asked)
        # History and count; a count in int16 goes back by whole rings.
        LENGTH: tl.constexpr = 10
        ring = HISTORY + (count % LENGTH) * 2 * N + n
        tl.store(ring, state | (target << 8) | (cause << 16), mask=moved)
        tl.store(ring + N, tl.zeros([BN], tl.int32) + epoch, mask=moved)
        count = tl.where(count < 32_760, count, LENGTH) + 1
        tl.store(COUNT + n, count.to(tl.int16), mask=moved)
        # The row; a renewed one begins as a row of a new layer does.
        to = tl.where(moved, target, 0)
        own = tl.where(among(STATES[6], to), -1, tl.where(blueprint >= 0, blueprint, own))
        kept = tl.where(anew, -1, tl.where(checkpoint >= 0, checkpoint, kept))
        tl.store(COLUMNS + n, to, mask=moved)
        tl.store(COLUMNS + N + n, own, mask=moved)
        tl.store(COLUMNS + 4 * N + n, tl.where(anew, -1, state), mask=moved)
        tl.store(COLUMNS + 5 * N + n, kept, mask=moved)
        strategy = tl.where(moved & (chosen >= 0), chosen, strategy)
        strategy = tl.where(anew, 0, strategy)
        nought = tl.zeros([BN], tl.int32)
        tl.store(COLUMNS + 6 * N + n, nought, mask=anew)
        tl.store(COLUMNS + 7 * N + n, nought, mask=anew)
        for i in tl.static_range(4):
            tl.store(METRICS + i * N + n, nought.to(tl.float32), mask=anew)
        tl.store(VALID + n, nought.to(tl.uint8), mask=anew)
        tl.store(GENERATION + n, (generation + 1).to(tl.int16), mask=anew)
        age = tl.where(moved, 0, age)
        held = tl.where(moved, tl.where(among(STATES[5], to), 1.0, 0.0), held)
        state = tl.where(moved, target, state)
        # Whoever enters GRAFTING remembers nothing.
        born = moved & (target == GRAFTING)
        velocity = tl.where(born, 0.0, velocity)
        last = tl.where(born, 0.0, last)
        pause = tl.where(born, 0, pause)
        paused = tl.where(born, 0, paused)
        ramp = tl.where(born, 0, ramp)
        waited = tl.where(born, INT16_MAX, waited)
        bad = tl.where(born, 0, bad)
        streak = tl.where(born, 0, streak)
        limited = limited & (born == 0)
        unknown = tl.full([BN], float("nan"), tl.float64)
        for i in tl.static_range(2, 5):
            tl.store(FLOATS + i * N + n, unknown, mask=born)
    touched = born
    alpha = held
    if AGE:
        RAMP: tl.constexpr = RULES[0]
        drift_max = _wide(RULES[1])
        PAUSE: tl.constexpr = RULES[2]
        CONTINUE: tl.constexpr = RULES[3]
        factor = _wide(RULES[4])
        slow_drift = _wide(RULES[5])
        fast_delta = _wide(RULES[6])
        EVERY: tl.constexpr = RULES[7]
        loss_max = _wide(RULES[8])
        norm_max = _wide(RULES[9])
        accuracy_max = _wide(RULES[10])
        SWITCH: tl.constexpr = RULES[11]
        total = _wide(RULES[0])
        drift = tl.load(SIGNALS + n, mask=m, other=0.0)
        delta = tl.load(SIGNALS + N + n, mask=m, other=0.0)
        loss = tl.load(SIGNALS + 2 * N + n, mask=m, other=0.0)
        norm = tl.load(SIGNALS + 3 * N + n, mask=m, other=0.0)
        accuracy = tl.load(SIGNALS + 4 * N + n, mask=m, other=0.0)
        age += tl.where((state < STATES[4]) & (age < 2**31 - 1), 1, 0)
        grafting = m & (state == GRAFTING)
        touched = touched | grafting
        checked = grafting & (age % EVERY == 0)
        if SWITCH:
            improving = _wide(RULES[12])
            STREAK: tl.constexpr = RULES[13]
            COOLDOWN: tl.constexpr = RULES[14]
            longer = streak + tl.where(streak < UINT8_MAX, 1, 0)
            streak = tl.where(delta > improving, longer, 0)
            waited += tl.where(waited < INT16_MAX, 1, 0)
            wanted = tl.where(streak >= STREAK, MOMENTUM, strategy)
            wanted = tl.where(drift > drift_max, DRIFT, wanted)
            failed = (loss >= loss_max) | (norm >= norm_max) | (accuracy >= accuracy_max)
            wanted = tl.where(failed & checked, STABILITY, wanted)
            switches = grafting & (wanted != strategy) & (waited >= COOLDOWN)
            velocity = tl.where(switches, 0.0, velocity)
            last = tl.where(switches, 0.0, last)
            pause = tl.where(switches, 0, pause)
            paused = tl.where(switches, 0, paused)
            ramp = tl.where(switches, 0, ramp)
            bad = tl.where(switches, 0, bad)
            waited = tl.where(switches, 0, waited)
            limited = limited | switches
            strategy = tl.where(switches, wanted, strategy)
        by_drift = grafting & (strategy == DRIFT)
        by_momentum = grafting & (strategy == MOMENTUM)
        adaptive = grafting & (strategy == ADAPTIVE)
        by_stability = grafting & (strategy == STABILITY)
        now = held.to(tl.float64)
        most = now + _wide(RULES[15])
        straight = age.to(tl.float64) / total
        elapsed = age.to(tl.float64)
        if CONTINUE:
            elapsed = (age - paused).to(tl.float64)
        # Which of its three rules an adaptive row takes.
        known = _finite(drift) & _finite(delta)
        slow = adaptive & ((drift > slow_drift) | (pause > 0))
        fast = adaptive & (slow == 0) & known & (delta > fast_delta)
        begun = tl.where(ramp > 0, ramp, RAMP)
        plain = tl.where(known, elapsed / begun.to(tl.float64), float("nan"))
        # Rule 1.
        cautious = by_drift | slow
        again = cautious & (drift > drift_max)
        waiting = tl.where(again, PAUSE, pause)
        hold = cautious & ((waiting > 0) | (_finite(drift) == 0))
        slowed = tl.where(hold, float("nan"), elapsed / total)
        pause = tl.where(cautious, tl.maximum(waiting - 1, 0), pause)
        paused += tl.where(hold & (paused < INT16_MAX), 1, 0)
        # Rule 2.
        eager = by_momentum | fast
        pushed = velocity * factor + delta
        pushed = tl.where(_finite(pushed), pushed, float("nan"))
        velocity = tl.where(eager & (pushed == pushed), pushed, velocity)
        # An adaptive row's own ramp.
        longer = tl.minimum((begun * 5 + 3) // 4, 2 * RAMP)
        shorter = tl.maximum(begun * 9 // 10, (RAMP + 1) // 2)
        ramp = tl.where(slow, longer, tl.where(fast, shorter, ramp))
        # Checks of stability.
        known = _finite(loss) & _finite(norm) & _finite(accuracy)
        stable = (loss < loss_max) & (norm < norm_max) & (accuracy < accuracy_max)
        checked = checked & by_stability
        unclear = checked & (known == 0)
        stable = checked & known & stable
        failing = checked & known & (stable == 0)
        last = tl.where(stable, now, last)
        bad = tl.where(stable, 0, bad + tl.where(failing & (bad < UINT8_MAX), 1, 0))
        steady = tl.where(bad > 0, straight * 0.5, straight)
        steady = tl.where(bad >= 3, last, steady)
        steady = tl.where(unclear, float("nan"), steady)
        # Each row takes the result of its own rule.
        proposed = tl.where(strategy == LINEAR, straight, tl.full([BN], float("nan"), tl.float64))
        proposed = tl.where(by_drift, slowed, proposed)
        proposed = tl.where(by_momentum, straight + pushed, proposed)
        own_rule = tl.where(slow, slowed, tl.where(fast, elapsed / total + pushed, plain))
        proposed = tl.where(adaptive, _limited(own_rule, now, most), proposed)
        proposed = tl.where(by_stability, steady, proposed)
        proposed = tl.where(_finite(proposed), proposed, now)
        proposed = tl.where(limited, _limited(proposed, now, most), proposed)
        proposed = tl.where(proposed < 0.0, 0.0, tl.where(proposed > 1.0, 1.0, proposed))
        alpha = tl.where(grafting, proposed.to(tl.float32), held)
    tl.store(COLUMNS + 2 * N + n, age, mask=m)
    tl.store(COLUMNS + 3 * N + n, strategy, mask=m)
    tl.store(ALPHA + n, alpha, mask=moved | touched)
    tl.store(FLOATS + n, velocity, mask=touched)
    tl.store(FLOATS + N + n, last, mask=touched)
    tl.store(SHORTS + n, pause.to(tl.int16), mask=touched)
    tl.store(SHORTS + N + n, paused.to(tl.int16), mask=touched)
    tl.store(SHORTS + 2 * N + n, ramp.to(tl.int16), mask=touched)
    tl.store(SHORTS + 3 * N + n, waited.to(tl.int16), mask=touched)
    tl.store(BYTES + n, bad.to(tl.uint8), mask=touched)
    tl.store(BYTES + N + n, streak.to(tl.uint8), mask=touched)
    tl.store(BYTES + 2 * N + n, limited.to(tl.uint8), mask=touched)
