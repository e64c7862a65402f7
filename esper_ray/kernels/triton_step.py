"""Triton kernels of Adam's step of some slots of a bank, all weights of a slot together.

A program has one entry of the list and one part of each of its slot's weights. Sums are added in a
fixed order, so results do not differ from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def squares_kernel(G, SLOTS, COUNTS, PARTS, OLD,
                   WEIGHTS: tl.constexpr, SIZES: tl.constexpr, SPLITS: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    """PARTS [list, SPLITS] gets the sums of squared gradients, OLD [list] the steps so far."""
    entry, split = tl.program_id(0), tl.program_id(1)
    slot = tl.load(SLOTS + entry).to(tl.int64)
    if slot < 0:
        return
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(WEIGHTS):
        for start in range(split * BLOCK, SIZES[i], SPLITS * BLOCK):
            at = start + tl.arange(0, BLOCK)
            g = tl.load(G[i] + slot * SIZES[i] + at, mask=at < SIZES[i], other=0.0)
            total += g * g
    tl.store(PARTS + entry * SPLITS + split, tl.sum(total, 0))
    if split == 0:
        tl.store(OLD + entry, tl.load(COUNTS + slot))


@triton.jit
def adam_kernel(W, G, M, V, SLOTS, MOVES, SEEDS, COUNTS, PARTS, OLD, NORMS, FAULTS, ERRORS,
                WEIGHTS: tl.constexpr, SIZES: tl.constexpr, SPLITS: tl.constexpr,
                BLOCK: tl.constexpr, PADDED: tl.constexpr, LR: tl.constexpr, WARMUP: tl.constexpr,
                CLIP: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, LOG1: tl.constexpr,
                LOG2: tl.constexpr, EPS: tl.constexpr):  # fmt: skip
    """After `squares_kernel`: move the listed slots of which MOVES [slots] says so.

    A slot whose norm is 0 or not finite keeps every bit. The seed of one that is not finite, or
    that has a fault, gets an error; the fault is taken back. LOG1 and LOG2 are log2 of the betas.
    """
    entry, split = tl.program_id(0), tl.program_id(1)
    slot = tl.load(SLOTS + entry).to(tl.int64)
    if slot < 0:
        return
    part = tl.arange(0, PADDED)
    squares = tl.load(PARTS + entry * SPLITS + part, mask=part < SPLITS, other=0.0)
    norm = tl.sqrt(tl.sum(squares, 0))
    finite = norm < float("inf")  # False for NaN too
    may = tl.load(MOVES + slot) != 0
    moved = may & finite & (norm > 0)
    old = tl.load(OLD + entry)
    if split == 0:
        seed = tl.load(SEEDS + slot)
        failed = (tl.load(FAULTS + seed) > 0) | (may & (finite == 0))
        tl.store(ERRORS + seed, tl.load(ERRORS + seed) + failed.to(tl.int32))
        tl.store(FAULTS + seed, 0.0)
        tl.store(NORMS + slot, norm)
        tl.store(COUNTS + slot, old + moved.to(tl.int32))
    if moved:
        age = (old + 1).to(tl.float64)  # 1 - 0.999 has few digits in float32
        rate = LR * tl.minimum(age / WARMUP, 1.0) / (1.0 - tl.exp2(age * LOG1))
        rate, second = rate.to(tl.float32), (1.0 - tl.exp2(age * LOG2)).to(tl.float32)
        scale = tl.minimum(CLIP / tl.maximum(norm, 1e-12), 1.0)
        for i in tl.static_range(WEIGHTS):
            for start in range(split * BLOCK, SIZES[i], SPLITS * BLOCK):
                within = start + tl.arange(0, BLOCK)
                mask, at = within < SIZES[i], slot * SIZES[i] + within
                g = tl.load(G[i] + at, mask=mask, other=0.0) * scale
                mean = tl.load(M[i] + at, mask=mask, other=0.0)
                mean += (1.0 - BETA1) * (g - mean)
                square = BETA2 * tl.load(V[i] + at, mask=mask, other=0.0) + (1.0 - BETA2) * g * g
                w = tl.load(W[i] + at, mask=mask, other=0.0)
                w -= rate * mean / (tl.sqrt(square / second) + EPS)
                tl.store(M[i] + at, mean, mask=mask)
                tl.store(V[i] + at, square, mask=mask)
                tl.store(W[i] + at, w, mask=mask)
