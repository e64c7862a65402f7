"""Triton kernels that blend seeds into a layer's output and take the gradients back.

A program holds the weights of one tile of seeds and walks over rows. Seeds of the list lie
anywhere among the features; each program gathers their chunks, so dormant neighbours cost nothing.
The two matrices of a tile are block-diagonal, one block per seed. Sums over rows are kept per
program and added up afterwards in a fixed order, so results do not differ from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _hidden_units(u, ACT: tl.constexpr):
    if ACT == "relu":
        u = tl.maximum(u, 0.0)
    elif ACT == "gelu":
        u = 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    return u


@triton.jit
def _slope(u, ACT: tl.constexpr):
    if ACT == "relu":
        d = tl.where(u > 0, 1.0, 0.0)
    elif ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))
        d = cdf + u * 0.3989422804014327 * tl.exp(-0.5 * u * u)
    else:
        d = tl.full(u.shape, 1.0, tl.float32)
    return d


@triton.jit
def _dot(a, b, IEEE: tl.constexpr):
    if IEEE:
        return tl.dot(a, b, input_precision="ieee")
    return tl.dot(a, b)


@triton.jit
def _columns(IDS, ALPHA, STARTS, SIZES, SLOTS, S, D, TILE: tl.constexpr, TC: tl.constexpr,
             ALIGN: tl.constexpr, DENSE: tl.constexpr):  # fmt: skip
    """Per column of the tile: entry of the list, slot, place in the chunk, feature, mask, alpha."""
    j = tl.arange(0, TC)
    entry = tl.program_id(0) * TILE + j // (TC // TILE)
    within = j % (TC // TILE)
    listed = entry < S
    seed = tl.load(IDS + entry, mask=listed, other=0)
    alpha = tl.load(ALPHA + seed, mask=listed, other=0.0)
    valid = listed & (within < tl.load(SIZES + seed, mask=listed, other=0)) & (alpha > 0)
    slot = tl.load(SLOTS + seed, mask=listed, other=0)
    if DENSE:  # all seeds, of chunks that fill their columns: one aligned run of features
        column = tl.program_id(0) * TC + j
        valid = column < D
    else:
        # Chunks begin and end at multiples of ALIGN: untold, loads would be 2 bytes wide.
        column = tl.load(STARTS + seed, mask=listed, other=0) + within
        column = tl.max_contiguous(tl.multiple_of(column, [ALIGN]), [ALIGN])
        valid = tl.max_constancy(valid, [ALIGN])
    return entry, slot, within, column, valid, alpha, seed


@triton.jit
def _units(IDS, ALPHA, SLOTS, S, TILE: tl.constexpr, HC: tl.constexpr, H: tl.constexpr):
    """Per hidden unit of the tile: entry of the list, slot, place among the units, mask."""
    k = tl.arange(0, HC)
    entry = tl.program_id(0) * TILE + k // (HC // TILE)
    unit = k % (HC // TILE)
    listed = entry < S
    seed = tl.load(IDS + entry, mask=listed, other=0)
    valid = listed & (unit < H) & (tl.load(ALPHA + seed, mask=listed, other=0.0) > 0)
    return entry, tl.load(SLOTS + seed, mask=listed, other=0), unit, valid


@triton.jit(do_not_specialize=["S", "RPP"])
def blend_kernel(Y, Z, X, W_IN, B_IN, W_OUT, B_OUT, IDS, ALPHA, STARTS, SIZES, SLOTS, FAULTS,
                 B, D, S, RPP, C: tl.constexpr, H: tl.constexpr, TILE: tl.constexpr,
                 TC: tl.constexpr, HC: tl.constexpr, BM: tl.constexpr, ALIGN: tl.constexpr,
                 DENSE: tl.constexpr, CHUNK: tl.constexpr, READ: tl.constexpr, BIASES: tl.constexpr,
                 RESIDUAL: tl.constexpr, ACT: tl.constexpr, SAVE: tl.constexpr,
                 IEEE: tl.constexpr):  # fmt: skip
    """Y [B, D] in place: y + alpha * delta on the listed chunks; X keeps them as they were.

    Weights are (slots, C, H), (slots, H), (slots, H, C), (slots, C); those that a blueprint has not
    are not read. Z [B, S * H] is what the seeds make of the host's input.
    """
    entry, slot, within, column, valid, alpha, seed = _columns(
        IDS, ALPHA, STARTS, SIZES, SLOTS, S, D, TILE, TC, ALIGN, DENSE)  # fmt: skip
    entry_h, slot_h, unit, valid_h = _units(IDS, ALPHA, SLOTS, S, TILE, HC, H)
    block = (entry[:, None] == entry_h[None, :]) & valid[:, None] & valid_h[None, :]  # [TC, HC]
    dtype = Y.dtype.element_ty
    slot, slot_h = slot.to(tl.int64), slot_h.to(tl.int64)
    if CHUNK:
        in_at = W_IN + slot_h[None, :] * (C * H) + within[:, None] * H + unit[None, :]
        w_in = tl.load(in_at, mask=block, other=0.0).to(dtype)
    out_at = W_OUT + slot_h[:, None] * (H * C) + unit[:, None] * C + within[None, :]
    w_out = tl.load(out_at, mask=tl.trans(block), other=0.0).to(dtype)  # [HC, TC]
    if BIASES:
        b_in = tl.load(B_IN + slot_h * H + unit, mask=valid_h, other=0.0).to(tl.float32)
        b_out = tl.load(B_OUT + slot * C + within, mask=valid, other=0.0).to(tl.float32)
    wrong = tl.zeros([BM, TC], tl.int32)  # summed once: a sum over rows costs a barrier
    start = tl.program_id(1) * RPP
    for r in range(start, tl.minimum(start + RPP, B), BM):
        rows = r + tl.arange(0, BM)
        here = rows < B
        mask = here[:, None] & valid[None, :]
        place = Y + rows.to(tl.int64)[:, None] * D + column[None, :]
        x = tl.load(place, mask=mask, other=0.0)
        if CHUNK:
            u = _dot(x, w_in, IEEE)
        else:
            u = tl.zeros([BM, HC], tl.float32)
        if READ:
            z_at = Z + rows.to(tl.int64)[:, None] * (S * H) + (entry_h * H + unit)[None, :]
            u += tl.load(z_at, mask=here[:, None] & valid_h[None, :], other=0.0).to(tl.float32)
        if BIASES:
            u += b_in[None, :]
        f = _dot(_hidden_units(u, ACT).to(dtype), w_out, IEEE)
        if BIASES:
            f += b_out[None, :]
        if not RESIDUAL:
            f -= x.to(tl.float32)
        fine = tl.abs(f) < float("inf")  # False for NaN too
        wrong |= tl.where(mask & (fine == 0), 1, 0)
        y = x.to(tl.float32) + tl.where(fine, alpha[None, :] * f, 0.0)
        tl.store(place, y.to(dtype), mask=mask)
        if SAVE:
            kept = (tl.program_id(0).to(tl.int64) * B + rows.to(tl.int64))[:, None] * TC
            tl.store(X + kept + tl.arange(0, TC)[None, :], x, mask=here[:, None])
    # Whoever finds a fault writes the same number.
    tl.store(FAULTS + seed, tl.full([TC], 1.0, tl.float32), mask=valid & (tl.max(wrong, 0) > 0))


@triton.jit(do_not_specialize=["S", "RPP"])
def blend_backward_kernel(G, DZ, Z, X, W_IN, B_IN, W_OUT, DW, IDS, ALPHA, STARTS, SIZES, SLOTS,
                          B, D, S, RPP, C: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
                          TILE: tl.constexpr, TC: tl.constexpr, HC: tl.constexpr, BM: tl.constexpr,
                          ALIGN: tl.constexpr, DENSE: tl.constexpr, CHUNK: tl.constexpr,
                          READ: tl.constexpr, BIASES: tl.constexpr, RESIDUAL: tl.constexpr,
                          ACT: tl.constexpr, IEEE: tl.constexpr):  # fmt: skip
    """Gradients of `blend_kernel`: G [B, D] in place becomes that of h, DZ [B, S * H] that of Z.

    DW [programs over rows, S, P] gets the sums of each program, in the order of `Form.packed`.
    """
    entry, _, within, column, valid, alpha, _ = _columns(
        IDS, ALPHA, STARTS, SIZES, SLOTS, S, D, TILE, TC, ALIGN, DENSE)  # fmt: skip
    entry_h, slot_h, unit, valid_h = _units(IDS, ALPHA, SLOTS, S, TILE, HC, H)
    block = (entry[:, None] == entry_h[None, :]) & valid[:, None] & valid_h[None, :]
    first: tl.constexpr = C * H if CHUNK else 0
    second: tl.constexpr = first + H if BIASES else first
    dtype = G.dtype.element_ty
    slot_h = slot_h.to(tl.int64)
    if CHUNK:
        in_at = W_IN + slot_h[None, :] * (C * H) + within[:, None] * H + unit[None, :]
        w_in = tl.load(in_at, mask=block, other=0.0).to(dtype)
    out_at = W_OUT + slot_h[None, :] * (H * C) + unit[None, :] * C + within[:, None]
    w_out = tl.load(out_at, mask=block, other=0.0).to(dtype)  # [TC, HC], transposed
    if BIASES:
        b_in = tl.load(B_IN + slot_h * H + unit, mask=valid_h, other=0.0).to(tl.float32)
    d_in = tl.zeros([TC, HC], tl.float32)
    d_out = tl.zeros([TC, HC], tl.float32)
    d_b_in = tl.zeros([BM, HC], tl.float32)
    d_b_out = tl.zeros([BM, TC], tl.float32)
    start = tl.program_id(1) * RPP
    for r in range(start, tl.minimum(start + RPP, B), BM):
        rows = r + tl.arange(0, BM)
        here = rows < B
        mask = here[:, None] & valid[None, :]
        place = G + rows.to(tl.int64)[:, None] * D + column[None, :]
        g = tl.load(place, mask=mask, other=0.0)
        if CHUNK:
            kept = (tl.program_id(0).to(tl.int64) * B + rows.to(tl.int64))[:, None] * TC
            x = tl.load(X + kept + tl.arange(0, TC)[None, :], mask=mask, other=0.0)
            u = _dot(x, w_in, IEEE)
        else:
            u = tl.zeros([BM, HC], tl.float32)
        z_at = rows.to(tl.int64)[:, None] * (S * H) + (entry_h * H + unit)[None, :]
        z_mask = here[:, None] & valid_h[None, :]
        if READ:
            u += tl.load(Z + z_at, mask=z_mask, other=0.0).to(tl.float32)
        if BIASES:
            u += b_in[None, :]
        gf = alpha[None, :] * g.to(tl.float32)
        low = gf.to(dtype)
        gu = _dot(low, w_out, IEEE) * _slope(u, ACT)
        gu = tl.where(z_mask & (tl.abs(gu) < float("inf")), gu, 0.0)
        d_out += _dot(tl.trans(low), _hidden_units(u, ACT).to(dtype), IEEE)
        d_b_in += gu
        d_b_out += gf
        if READ:
            tl.store(DZ + z_at, gu.to(dtype), mask=z_mask)
        if CHUNK:
            low_u = gu.to(dtype)
            d_in += _dot(tl.trans(x), low_u, IEEE)
            dx = _dot(low_u, tl.trans(w_in), IEEE)
            dx = tl.where(tl.abs(dx) < float("inf"), dx, 0.0)
            if not RESIDUAL:
                dx -= gf
            tl.store(place, (g.to(tl.float32) + dx).to(dtype), mask=mask)
    to = DW + (tl.program_id(1).to(tl.int64) * S + entry_h.to(tl.int64))[None, :] * P
    if CHUNK:
        tl.store(to + within[:, None] * H + unit[None, :], d_in, mask=block)
    tl.store(to + second + unit[None, :] * C + within[:, None], d_out, mask=block)
    base = tl.program_id(1).to(tl.int64) * S
    if BIASES:
        tl.store(DW + (base + entry_h) * P + first + unit, tl.sum(d_b_in, 0), mask=valid_h)
        tl.store(DW + (base + entry) * P + second + H * C + within, tl.sum(d_b_out, 0), mask=valid)


@triton.jit(do_not_specialize=["S", "PROGRAMS"])
def fold_kernel(DW, D_IN, D_B_IN, D_OUT, D_B_OUT, IDS, SLOTS, S, PROGRAMS, C: tl.constexpr,
                H: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
                CHUNK: tl.constexpr, BIASES: tl.constexpr):  # fmt: skip
    """Sums of DW [PROGRAMS, S, P] over programs, into the slots of the listed seeds."""
    first: tl.constexpr = C * H if CHUNK else 0
    second: tl.constexpr = first + H if BIASES else first
    e = tl.program_id(0) * BP + tl.arange(0, BP)
    listed = e < S * P
    total = tl.zeros([BP], tl.float32)
    for n in range(0, PROGRAMS, BN):
        program = n + tl.arange(0, BN)
        at = program.to(tl.int64)[:, None] * (S * P) + e[None, :]
        mask = (program < PROGRAMS)[:, None] & listed[None, :]
        total += tl.sum(tl.load(DW + at, mask=mask, other=0.0), 0)
    p = e % P
    seed = tl.load(IDS + e // P, mask=listed, other=0)
    slot = tl.load(SLOTS + seed, mask=listed, other=0).to(tl.int64)
    if CHUNK:
        tl.store(D_IN + slot * (C * H) + p, total, mask=listed & (p < first))
    o = p - second
    tl.store(D_OUT + slot * (H * C) + o, total, mask=listed & (o >= 0) & (o < H * C))
    if BIASES:
        tl.store(D_B_IN + slot * H + p - first, total, mask=listed & (p >= first) & (o < 0))
        tl.store(D_B_OUT + slot * C + o - H * C, total, mask=listed & (o >= H * C))


@triton.jit(do_not_specialize=["ROWS", "FIRST"])
def moments_kernel(Y, SHIFT, TOTAL, SQUARE, ROWS, FIRST, STRIDE, D,
                   BM: tl.constexpr, BN: tl.constexpr, BOTH: tl.constexpr):  # fmt: skip
    """Add sums of y - shift, and of its square, over rows FIRST, FIRST + STRIDE, ... of Y [.., D].

    Each column belongs to one program, which adds in a fixed order. Without BOTH only squares of y.
    """
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = column < D
    total = tl.zeros([BM, BN], tl.float32)
    square = tl.zeros([BM, BN], tl.float32)
    if BOTH:
        shift = tl.load(SHIFT + column, mask=inside, other=0.0)
    for r in range(0, ROWS, BM):
        row = r + tl.arange(0, BM)
        mask = (row < ROWS)[:, None] & inside[None, :]
        at = (FIRST + row.to(tl.int64) * STRIDE)[:, None] * D + column[None, :]
        y = tl.load(Y + at, mask=mask, other=0.0).to(tl.float32)
        if BOTH:
            y = tl.where(mask, y - shift[None, :], 0.0)
            total += y
        square += y * y
    if BOTH:
        old = tl.load(TOTAL + column, mask=inside, other=0.0)
        tl.store(TOTAL + column, old + tl.sum(total, 0), mask=inside)
    old = tl.load(SQUARE + column, mask=inside, other=0.0)
    tl.store(SQUARE + column, old + tl.sum(square, 0), mask=inside)
