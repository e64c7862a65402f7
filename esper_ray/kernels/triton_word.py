"""The blend of `triton_blend` where all seeds are at work and each chunk is one machine word.

4 features of bf16 are one. A thread holds the weights of one seed in its registers and walks over
rows; a warp reads the words of 32 seeds at once, and asks for those of the next rows before it
computes. Matrix units would multiply by blocks of which three quarters are zeros. Sums over rows
are kept per program and added up afterwards in a fixed order, so results do not differ from run to
run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from esper_ray.kernels.triton_blend import _hidden_units, _slope


@triton.jit
def _numbers(word, C: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr):
    """The C numbers of each word, as float32."""
    found = ()
    for c in tl.static_range(C):
        # By halves of 32 bits, which are registers: shifts of 64 bits take several instructions.
        half = (word >> (c * BITS // 32 * 32)).to(tl.int32)
        if BITS == 32:
            number = half.to(tl.float32, bitcast=True)
        elif FLOAT == tl.bfloat16:  # the upper half of a float32
            raw = half & -65536 if c % 2 else half << 16
            number = raw.to(tl.float32, bitcast=True)
        else:
            raw = (half >> (c % 2 * 16)).to(tl.int16)
            number = raw.to(FLOAT, bitcast=True).to(tl.float32)
        found = found + (number,)
    return found


@triton.jit
def _packed(numbers, C: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr, WORD: tl.constexpr):
    """The words of C float32 numbers each."""
    out = tl.zeros(numbers[0].shape, WORD)
    for first in tl.static_range(0, C, 32 // BITS):
        half = tl.zeros(numbers[0].shape, tl.int32)
        for c in tl.static_range(first, min(C, first + 32 // BITS)):
            raw = numbers[c].to(FLOAT)
            if BITS == 16:
                half |= raw.to(tl.uint16, bitcast=True).to(tl.int32) << (c % 2 * 16)
            else:
                half = raw.to(tl.int32, bitcast=True)
        out |= half.to(tl.uint32, bitcast=True).to(WORD) << (first * BITS)
    return out


@triton.jit
def _loaded(AT, COUNT: tl.constexpr, mask):
    """COUNT weights of each seed, one after the other from AT on."""
    found = ()
    for p in tl.static_range(COUNT):
        found = found + (tl.load(AT + p, mask=mask, other=0.0).to(tl.float32),)
    return found


@triton.jit
def _noughts(COUNT: tl.constexpr, BS: tl.constexpr):
    found = ()
    for _ in tl.static_range(COUNT):
        found = found + (tl.zeros([BS], tl.float32),)
    return found


@triton.jit
def _words(AT, STEP, first, end, mask, BS: tl.constexpr, BM: tl.constexpr):
    """Words of rows first to first + BM, all asked for before the first is used, 0 past the end."""
    found = ()
    for i in tl.static_range(BM):
        row = tl.zeros([BS], tl.int64) + (first + i)
        found = found + (tl.load(AT + row * STEP, mask=mask & (row < end), other=0),)
    return found


@triton.jit
def _unit(x, w_in, b_in, k: tl.constexpr, C: tl.constexpr, H: tl.constexpr):
    """Hidden unit k of each seed before the activation."""
    u = b_in[k]
    for c in tl.static_range(C):
        u += x[c] * w_in[c * H + k]
    return u


@triton.jit
def _seeds(ALPHA, SLOTS, N, BS: tl.constexpr):
    """Per thread: its seed, whether there is one, its slot and alpha."""
    seed = tl.program_id(0) * BS + tl.arange(0, BS)
    real = seed < N
    alpha = tl.load(ALPHA + seed, mask=real, other=0.0)
    slot = tl.load(SLOTS + seed, mask=real, other=0).to(tl.int64)
    return seed, real, slot, alpha


@triton.jit(do_not_specialize=["RPP"])
def word_blend_kernel(Y, OUT, W_IN, B_IN, W_OUT, B_OUT, ALPHA, SLOTS, FAULTS, B, N, RPP,
                      C: tl.constexpr, H: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr,
                      BS: tl.constexpr, BM: tl.constexpr, BIASES: tl.constexpr,
                      RESIDUAL: tl.constexpr, ACT: tl.constexpr):  # fmt: skip
    """OUT [B, N] words: y + alpha * delta; it may be Y.

    Every word is written, with its own bits where alpha is 0, as OUT may be a new tensor.
    Weights are (slots, C, H), (slots, H), (slots, H, C), (slots, C).
    """
    WORD: tl.constexpr = Y.dtype.element_ty
    seed, real, slot, alpha = _seeds(ALPHA, SLOTS, N, BS)
    valid = real & (alpha > 0)
    w_in = _loaded(W_IN + slot * (C * H), C * H, valid)
    w_out = _loaded(W_OUT + slot * (H * C), H * C, valid)
    b_in, b_out = _noughts(H, BS), _noughts(C, BS)
    if BIASES:
        b_in, b_out = _loaded(B_IN + slot * H, H, valid), _loaded(B_OUT + slot * C, C, valid)
    faults = tl.zeros([BS], tl.float32)
    start = tl.program_id(1) * RPP
    end = tl.minimum(start + RPP, B)
    words = _words(Y + seed, N, start, end, real, BS, BM)
    for r in range(start, end, BM):
        ahead = _words(Y + seed, N, r + BM, end, real, BS, BM)
        for i in tl.static_range(BM):
            x = _numbers(words[i], C, BITS, FLOAT)
            f = b_out
            for k in tl.static_range(H):
                a = _hidden_units(_unit(x, w_in, b_in, k, C, H), ACT)
                more = ()
                for c in tl.static_range(C):
                    more = more + (f[c] + a * w_out[k * C + c],)
                f = more
            blended = ()
            for c in tl.static_range(C):
                delta = f[c] if RESIDUAL else f[c] - x[c]
                fine = tl.abs(delta) < float("inf")  # False for NaN too
                faults += delta * 0.0  # NaN from the first that is not finite on
                blended = blended + (x[c] + tl.where(fine, alpha * delta, 0.0),)
            out = _packed(blended, C, BITS, FLOAT, WORD)
            row = tl.zeros([BS], tl.int64) + (r + i)
            out = tl.where(valid, out, words[i])
            tl.store(OUT + row * N + seed, out, mask=real & (row < end))
        words = ahead
    # Whoever finds a fault writes the same number.
    tl.store(FAULTS + seed, tl.full([BS], 1.0, tl.float32), mask=valid & (faults != 0.0))


@triton.jit(do_not_specialize=["RPP"])
def word_backward_kernel(G, GH, Y, W_IN, B_IN, W_OUT, DW, ALPHA, SLOTS, B, N, RPP,
                         C: tl.constexpr, H: tl.constexpr, P: tl.constexpr, BITS: tl.constexpr,
                         FLOAT: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr,
                         BIASES: tl.constexpr, RESIDUAL: tl.constexpr,
                         ACT: tl.constexpr):  # fmt: skip
    """GH [B, N] words: the gradient of y, from that of the output, G; it may be G.

    Every word is written, with that of G where alpha is 0, as GH may be a new tensor.
    DW [programs over rows, N, P] gets the sums of each program, in the order of `Form.packed`.
    """
    WORD: tl.constexpr = G.dtype.element_ty
    seed, real, slot, alpha = _seeds(ALPHA, SLOTS, N, BS)
    valid = real & (alpha > 0)
    w_in = _loaded(W_IN + slot * (C * H), C * H, valid)
    w_out = _loaded(W_OUT + slot * (H * C), H * C, valid)
    b_in = _noughts(H, BS)
    if BIASES:
        b_in = _loaded(B_IN + slot * H, H, valid)
    d_in, d_b_in = _noughts(C * H, BS), _noughts(H, BS)
    d_out, d_b_out = _noughts(H * C, BS), _noughts(C, BS)
    start = tl.program_id(1) * RPP
    end = tl.minimum(start + RPP, B)
    words = _words(G + seed, N, start, end, real, BS, BM)
    kept = _words(Y + seed, N, start, end, valid, BS, BM)
    for r in range(start, end, BM):
        ahead = _words(G + seed, N, r + BM, end, real, BS, BM)
        kept_ahead = _words(Y + seed, N, r + BM, end, valid, BS, BM)
        for i in tl.static_range(BM):
            x = _numbers(kept[i], C, BITS, FLOAT)
            g = _numbers(words[i], C, BITS, FLOAT)
            gf, more = (), ()
            for c in tl.static_range(C):
                gf = gf + (tl.where(valid, alpha * g[c], 0.0),)
                more = more + (d_b_out[c] + gf[c],)
            d_b_out = more
            gu, more, more_out = (), (), ()
            for k in tl.static_range(H):
                u = _unit(x, w_in, b_in, k, C, H)
                a = _hidden_units(u, ACT)
                total = gf[0] * w_out[k * C]
                for c in tl.static_range(1, C):
                    total += gf[c] * w_out[k * C + c]
                total *= _slope(u, ACT)
                gu = gu + (tl.where(tl.abs(total) < float("inf"), total, 0.0),)
                more = more + (d_b_in[k] + gu[k],)
                for c in tl.static_range(C):
                    more_out = more_out + (d_out[k * C + c] + gf[c] * a,)
            d_b_in, d_out = more, more_out
            summed, more = (), ()
            for c in tl.static_range(C):
                dx = tl.zeros([BS], tl.float32)
                for k in tl.static_range(H):
                    dx += gu[k] * w_in[c * H + k]
                    more = more + (d_in[c * H + k] + x[c] * gu[k],)
                dx = tl.where(tl.abs(dx) < float("inf"), dx, 0.0)
                if not RESIDUAL:
                    dx -= gf[c]
                summed = summed + (g[c] + dx,)
            d_in = more
            out = _packed(summed, C, BITS, FLOAT, WORD)
            row = tl.zeros([BS], tl.int64) + (r + i)
            out = tl.where(valid, out, words[i])
            tl.store(GH + row * N + seed, out, mask=real & (row < end))
        words, kept = ahead, kept_ahead
    to = DW + (tl.program_id(1).to(tl.int64) * N + seed) * P
    second: tl.constexpr = C * H + H if BIASES else C * H
    for p in tl.static_range(C * H):
        tl.store(to + p, d_in[p], mask=real)
        tl.store(to + second + p, d_out[p], mask=real)
    if BIASES:
        for k in tl.static_range(H):
            tl.store(to + C * H + k, d_b_in[k], mask=real)
        for c in tl.static_range(C):
            tl.store(to + second + H * C + c, d_b_out[c], mask=real)
