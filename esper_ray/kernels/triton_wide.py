"""The blend of `triton_blend` for seeds of many hidden units, which no program can hold at once.

A program takes one seed. Hidden units come in blocks that never leave the chip: forward and the
gradient of the chunk walk over blocks of units at some rows; the gradients of the weights walk over
rows at one block of units, and compute the units anew.
"""

from __future__ import annotations

import triton
import triton.language as tl

from esper_ray.kernels.triton_blend import _columns, _dot, _hidden_units, _slope


@triton.jit
def _weights(W_IN, B_IN, W_OUT, slot, k, within, valid, C: tl.constexpr, H: tl.constexpr,
             HB: tl.constexpr, CHUNK: tl.constexpr, BIASES: tl.constexpr,
             dtype: tl.constexpr):  # fmt: skip
    """Units k.. of one seed: their numbers, mask, w_chunk and w_out, both [TC, HB], and b_in."""
    unit = k + tl.arange(0, HB)
    real = unit < H
    block = valid[:, None] & real[None, :]
    at = slot.to(tl.int64)[:, None] * (C * H)
    w_out = tl.load(W_OUT + at + unit[None, :] * C + within[:, None], mask=block, other=0.0)
    w_in, b_in = w_out, tl.zeros([HB], tl.float32)
    if CHUNK:
        w_in = tl.load(W_IN + at + within[:, None] * H + unit[None, :], mask=block, other=0.0)
    if BIASES:
        b_in = tl.load(B_IN + tl.max(slot, 0).to(tl.int64) * H + unit, mask=real, other=0.0)
    return unit, real, w_in.to(dtype), w_out.to(dtype), b_in.to(tl.float32)


@triton.jit
def _before(x, w_in, b_in, z_at, z_mask, BM: tl.constexpr, HB: tl.constexpr, CHUNK: tl.constexpr,
            READ: tl.constexpr, IEEE: tl.constexpr):  # fmt: skip
    """Hidden units [BM, HB] before the activation."""
    if CHUNK:
        u = _dot(x, w_in, IEEE)
    else:
        u = tl.zeros([BM, HB], tl.float32)
    if READ:
        u += tl.load(z_at, mask=z_mask, other=0.0).to(tl.float32)
    return u + b_in[None, :]


@triton.jit(do_not_specialize=["S"])
def wide_blend_kernel(Y, Z, X, W_IN, B_IN, W_OUT, B_OUT, IDS, ALPHA, STARTS, SIZES, SLOTS, FAULTS,
                      B, D, S, C: tl.constexpr, H: tl.constexpr, TC: tl.constexpr,
                      HB: tl.constexpr, BM: tl.constexpr, ALIGN: tl.constexpr,
                      DENSE: tl.constexpr, CHUNK: tl.constexpr, READ: tl.constexpr,
                      BIASES: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
                      SAVE: tl.constexpr, IEEE: tl.constexpr):  # fmt: skip
    """As `blend_kernel`, BM rows of one seed."""
    _, slot, within, column, valid, alpha, seed = _columns(
        IDS, ALPHA, STARTS, SIZES, SLOTS, S, D, 1, TC, ALIGN, DENSE)  # fmt: skip
    dtype = Y.dtype.element_ty
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    here = rows < B
    mask = here[:, None] & valid[None, :]
    place = Y + rows.to(tl.int64)[:, None] * D + column[None, :]
    x = tl.load(place, mask=mask, other=0.0)
    f = tl.zeros([BM, TC], tl.float32)
    for k in range(0, H, HB):
        unit, real, w_in, w_out, b_in = _weights(
            W_IN, B_IN, W_OUT, slot, k, within, valid, C, H, HB, CHUNK, BIASES, dtype)  # fmt: skip
        z_at = Z + rows.to(tl.int64)[:, None] * (S * H) + (tl.program_id(0) * H + unit)[None, :]
        u = _before(x, w_in, b_in, z_at, here[:, None] & real[None, :], BM, HB, CHUNK, READ, IEEE)
        f += _dot(_hidden_units(u, ACT).to(dtype), tl.trans(w_out), IEEE)
    if BIASES:
        b_out = tl.load(B_OUT + slot.to(tl.int64) * C + within, mask=valid, other=0.0)
        f += b_out.to(tl.float32)[None, :]
    if not RESIDUAL:
        f -= x.to(tl.float32)
    fine = tl.abs(f) < float("inf")  # False for NaN too
    y = x.to(tl.float32) + tl.where(fine, alpha[None, :] * f, 0.0)
    tl.store(place, y.to(dtype), mask=mask)
    if SAVE:
        kept = (tl.program_id(0).to(tl.int64) * B + rows.to(tl.int64))[:, None] * TC
        tl.store(X + kept + tl.arange(0, TC)[None, :], x, mask=here[:, None])
    wrong = tl.max(tl.where(mask & (fine == 0), 1, 0), 0)
    tl.store(FAULTS + seed, tl.full([TC], 1.0, tl.float32), mask=valid & (wrong > 0))


@triton.jit(do_not_specialize=["S"])
def wide_chunk_gradient_kernel(G, Z, X, W_IN, B_IN, W_OUT, IDS, ALPHA, STARTS, SIZES, SLOTS,
                               B, D, S, C: tl.constexpr, H: tl.constexpr, TC: tl.constexpr,
                               HB: tl.constexpr, BM: tl.constexpr, ALIGN: tl.constexpr,
                               DENSE: tl.constexpr, CHUNK: tl.constexpr,
                               READ: tl.constexpr, BIASES: tl.constexpr, RESIDUAL: tl.constexpr,
                               ACT: tl.constexpr, IEEE: tl.constexpr):  # fmt: skip
    """G [B, D] in place becomes the gradient of h, at BM rows of one seed."""
    _, slot, within, column, valid, alpha, _ = _columns(
        IDS, ALPHA, STARTS, SIZES, SLOTS, S, D, 1, TC, ALIGN, DENSE)  # fmt: skip
    dtype = G.dtype.element_ty
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    here = rows < B
    mask = here[:, None] & valid[None, :]
    place = G + rows.to(tl.int64)[:, None] * D + column[None, :]
    g = tl.load(place, mask=mask, other=0.0)
    kept = (tl.program_id(0).to(tl.int64) * B + rows.to(tl.int64))[:, None] * TC
    x = tl.load(X + kept + tl.arange(0, TC)[None, :], mask=mask, other=0.0)
    gf = alpha[None, :] * g.to(tl.float32)
    low = gf.to(dtype)
    dx = tl.zeros([BM, TC], tl.float32)
    for k in range(0, H, HB):
        unit, real, w_in, w_out, b_in = _weights(
            W_IN, B_IN, W_OUT, slot, k, within, valid, C, H, HB, CHUNK, BIASES, dtype)  # fmt: skip
        z_at = Z + rows.to(tl.int64)[:, None] * (S * H) + (tl.program_id(0) * H + unit)[None, :]
        z_mask = here[:, None] & real[None, :]
        u = _before(x, w_in, b_in, z_at, z_mask, BM, HB, CHUNK, READ, IEEE)
        gu = _dot(low, w_out, IEEE) * _slope(u, ACT)
        gu = tl.where(z_mask & (tl.abs(gu) < float("inf")), gu, 0.0)
        dx += _dot(gu.to(dtype), tl.trans(w_in), IEEE)
    dx = tl.where(tl.abs(dx) < float("inf"), dx, 0.0)
    if not RESIDUAL:
        dx -= gf
    tl.store(place, (g.to(tl.float32) + dx).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["S", "RPP"])
def wide_weight_gradient_kernel(G, DZ, Z, X, W_IN, B_IN, W_OUT, DW, IDS, ALPHA, STARTS, SIZES,
                                SLOTS, B, D, S, RPP, C: tl.constexpr, H: tl.constexpr,
                                P: tl.constexpr, TC: tl.constexpr, HB: tl.constexpr,
                                BM: tl.constexpr, ALIGN: tl.constexpr, DENSE: tl.constexpr,
                                CHUNK: tl.constexpr, READ: tl.constexpr, BIASES: tl.constexpr,
                                RESIDUAL: tl.constexpr, ACT: tl.constexpr,
                                IEEE: tl.constexpr):  # fmt: skip
    """DZ and DW as `blend_backward_kernel` fills them, one block of units at RPP rows of a seed."""
    _, slot, within, column, valid, alpha, _ = _columns(
        IDS, ALPHA, STARTS, SIZES, SLOTS, S, D, 1, TC, ALIGN, DENSE)  # fmt: skip
    first: tl.constexpr = C * H if CHUNK else 0
    second: tl.constexpr = first + H if BIASES else first
    dtype = G.dtype.element_ty
    k = tl.program_id(2) * HB
    unit, real, w_in, w_out, b_in = _weights(
        W_IN, B_IN, W_OUT, slot, k, within, valid, C, H, HB, CHUNK, BIASES, dtype)  # fmt: skip
    d_in = tl.zeros([TC, HB], tl.float32)
    d_out = tl.zeros([TC, HB], tl.float32)
    d_b_in = tl.zeros([BM, HB], tl.float32)  # summed once: a sum over rows costs a barrier
    d_b_out = tl.zeros([BM, TC], tl.float32)
    start = tl.program_id(1) * RPP
    for r in range(start, tl.minimum(start + RPP, B), BM):
        rows = r + tl.arange(0, BM)
        here = rows < B
        mask = here[:, None] & valid[None, :]
        g = tl.load(G + rows.to(tl.int64)[:, None] * D + column[None, :], mask=mask, other=0.0)
        x = g
        if CHUNK:
            kept = (tl.program_id(0).to(tl.int64) * B + rows.to(tl.int64))[:, None] * TC
            x = tl.load(X + kept + tl.arange(0, TC)[None, :], mask=mask, other=0.0)
        z_at = rows.to(tl.int64)[:, None] * (S * H) + (tl.program_id(0) * H + unit)[None, :]
        z_mask = here[:, None] & real[None, :]
        u = _before(x, w_in, b_in, Z + z_at, z_mask, BM, HB, CHUNK, READ, IEEE)
        gf = alpha[None, :] * g.to(tl.float32)
        low = gf.to(dtype)
        gu = _dot(low, w_out, IEEE) * _slope(u, ACT)
        gu = tl.where(z_mask & (tl.abs(gu) < float("inf")), gu, 0.0)
        low_u = gu.to(dtype)
        d_out += _dot(tl.trans(low), _hidden_units(u, ACT).to(dtype), IEEE)
        if READ:
            tl.store(DZ + z_at, low_u, mask=z_mask)
        if CHUNK:
            d_in += _dot(tl.trans(x), low_u, IEEE)
        if BIASES:
            d_b_in += gu
            d_b_out += gf
    to = DW + (tl.program_id(1).to(tl.int64) * S + tl.program_id(0)) * P
    block = valid[:, None] & real[None, :]
    if CHUNK:
        tl.store(to + within[:, None] * H + unit[None, :], d_in, mask=block)
    tl.store(to + second + unit[None, :] * C + within[:, None], d_out, mask=block)
    if BIASES:
        tl.store(to + first + unit, tl.sum(d_b_in, 0), mask=real)
        if tl.program_id(2) == 0:
            tl.store(to + second + H * C + within, tl.sum(d_b_out, 0), mask=valid)
