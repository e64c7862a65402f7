"""How the Triton kernels of the blend are begun: their grids, and what they are compiled for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
import triton.language as tl
from torch import Tensor

from esper_ray.kernels.form import Layout
from esper_ray.kernels.seeds import Seeds
from esper_ray.kernels.triton_blend import blend_backward_kernel, blend_kernel, fold_kernel
from esper_ray.kernels.triton_wide import (
    wide_blend_kernel,
    wide_chunk_gradient_kernel,
    wide_weight_gradient_kernel,
)
from esper_ray.kernels.triton_word import word_backward_kernel, word_blend_kernel

_MULTIPROCESSORS: Final = 132
WIDE_ROWS: Final = 64
"""Rows that a program of the wide kernels takes at once."""
WORD_BLEND, WORD_BACKWARD = (32, 8, 384), (64, 4, 256)
"""Seeds of a program, rows whose words it asks for at once, threads that a multiprocessor gets."""
_WORDS: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_FLOATS: Final = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}

# ---- all seeds, of chunks that are words -------------------------------------------------------


def blend_words(
    y: Tensor, weights: Sequence[Tensor], seeds: Seeds, in_place: bool, save: bool
) -> tuple[Tensor, Tensor]:
    """The blend of y (samples, width), and what backward reads if there is to be one: y itself.

    It is written over y only where nobody reads that again.
    """
    out = y if in_place and not save else torch.empty_like(y)
    read, write = (_as_words(tensor, seeds) for tensor in (y, out))
    grid, rows, meta = _word_meta(y, seeds, WORD_BLEND)
    word_blend_kernel[grid](
        read, write, *_named(weights, seeds), seeds.alpha, seeds.slots, seeds.faults, *read.shape,
        rows, **meta,
    )  # fmt: skip
    return out, y


def word_gradients(
    g: Tensor, y: Tensor, weights: Sequence[Tensor], seeds: Seeds, own: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of y, written over g if it is one's `own`; (programs, seeds, n) sums."""
    gh = g if own else torch.empty_like(g)
    read, write, kept = (_as_words(tensor, seeds) for tensor in (g, gh, y))
    grid, rows, meta = _word_meta(g, seeds, WORD_BACKWARD)
    sums = torch.empty(grid[1], len(seeds.ids), seeds.numbers, device=g.device)
    word_backward_kernel[grid](
        read, write, kept, *_named(weights, seeds)[:3], sums, seeds.alpha, seeds.slots, *read.shape,
        rows, P=seeds.numbers, **meta,
    )  # fmt: skip
    return gh, sums


def _as_words(y: Tensor, seeds: Seeds) -> Tensor:
    return y.view(_WORDS[seeds.layout.chunk * y.element_size()])


def _word_meta(
    y: Tensor, seeds: Seeds, sizes: tuple[int, int, int]
) -> tuple[tuple[int, int], int, dict[str, Any]]:
    """Grid, rows per program, and what is compiled: a thread a seed, and enough of them."""
    threads, block, resident = sizes
    blocks = -(-len(y) // block)
    splits = max(1, min(blocks, _MULTIPROCESSORS * resident // max(len(seeds.ids), 1)))
    rows = -(-blocks // splits) * block
    form, layout = seeds.form, seeds.layout
    meta = {
        "C": layout.chunk,
        "H": layout.hidden,
        "BITS": 8 * y.element_size(),
        "FLOAT": _FLOATS[y.dtype],
        "BS": threads,
        "BM": block,
        "BIASES": form.biases,
        "RESIDUAL": form.residual,
        "ACT": form.activation,
        "num_warps": threads // 32,
    }
    return (-(-len(seeds.ids) // threads), -(-len(y) // rows)), rows, meta


# ---- all others --------------------------------------------------------------------------------


def blend_tiles(
    y: Tensor, z: Tensor | None, weights: Sequence[Tensor], seeds: Seeds, save: bool
) -> Tensor:
    """Write the blend over y (samples, width); the chunks as they were, if to be saved."""
    tiles = -(-len(seeds.ids) // seeds.layout.tile)
    kept = y.new_empty((tiles, len(y), seeds.layout.columns) if save else (1,))
    read, own = y if z is None else z, _named(weights, seeds)
    told = (*own, *seeds.tensors, seeds.faults, len(y), y.shape[1], len(seeds.ids))
    if seeds.layout.wide:
        wide_blend_kernel[(tiles, -(-len(y) // WIDE_ROWS))](
            y, read, kept, *told, SAVE=save, **_wide(seeds, y)
        )
    else:
        rows, block, warps = _cut(len(y), tiles, seeds.layout)
        blend_kernel[(tiles, -(-len(y) // rows))](
            y, read, kept, *told, rows, BM=block, SAVE=save, num_warps=warps, num_stages=2,
            **seeds.meta(y),
        )  # fmt: skip
    return kept


def tile_gradients(
    g: Tensor, dz: Tensor | None, z: Tensor | None, kept: Tensor, weights: Sequence[Tensor],
    seeds: Seeds,
) -> Tensor:  # fmt: skip
    """Write the gradient of y over g, and dz; (programs, rows, n) sums for the weights."""
    if seeds.layout.wide:
        return _wide_gradients(g, dz, z, kept, weights, seeds)
    listed, tiles = len(seeds.ids), -(-len(seeds.ids) // seeds.layout.tile)
    rows, block, warps = _cut(len(g), tiles, seeds.layout)
    programs = -(-len(g) // rows)
    sums = torch.zeros(programs, listed, seeds.numbers, device=g.device)
    blend_backward_kernel[(tiles, programs)](
        g, g if dz is None else dz, g if z is None else z, kept, *_named(weights, seeds)[:3], sums,
        *seeds.tensors, *g.shape, listed, rows, P=seeds.numbers, BM=block, num_warps=warps,
        num_stages=2, **seeds.meta(g),
    )  # fmt: skip
    return sums


def _wide_gradients(
    g: Tensor, dz: Tensor | None, z: Tensor | None, kept: Tensor, weights: Sequence[Tensor],
    seeds: Seeds,
) -> Tensor:  # fmt: skip
    """The same by the wide kernels; that of the weights first, since the other changes g."""
    listed, blocks = len(seeds.ids), -(-seeds.layout.hidden // seeds.layout.block)
    splits = max(1, -(-_MULTIPROCESSORS * 4 // (listed * blocks)))
    rows = -(-len(g) // splits // WIDE_ROWS) * WIDE_ROWS if len(g) > WIDE_ROWS else WIDE_ROWS
    programs = -(-len(g) // rows)
    sums = torch.zeros(programs, listed, seeds.numbers, device=g.device)
    own, read, sizes = _named(weights, seeds)[:3], g if z is None else z, (*g.shape, listed)
    meta = _wide(seeds, g)
    fewer = {} if seeds.form.chunk is not None else {"BM": WIDE_ROWS // 2}  # dz is written too
    wide_weight_gradient_kernel[(listed, programs, blocks)](
        g, g if dz is None else dz, read, kept, *own, sums, *seeds.tensors, *sizes, rows,
        P=seeds.numbers, **(meta | fewer),
    )  # fmt: skip
    if seeds.form.chunk is not None:
        wide_chunk_gradient_kernel[(listed, -(-len(g) // WIDE_ROWS))](
            g, read, kept, *own, *seeds.tensors, *sizes, **meta
        )
    return sums


def _wide(seeds: Seeds, y: Tensor) -> dict[str, Any]:
    """What the wide kernels are compiled for."""
    meta = {k: v for k, v in seeds.meta(y).items() if k not in ("TILE", "HC")}
    return meta | {"HB": seeds.layout.block, "BM": WIDE_ROWS, "num_warps": 4, "num_stages": 2}


def _cut(samples: int, tiles: int, layout: Layout) -> tuple[int, int, int]:
    """Rows per program, rows at a time, warps: enough programs to fill the chip, and no more,
    since each loads its weights anew."""
    block, warps = (32, 8) if layout.columns * layout.hidden_columns >= 8192 else (64, 4)
    blocks = -(-samples // block)
    splits = max(1, min(blocks, -(-_MULTIPROCESSORS * 16 // max(tiles, 1))))
    return -(-blocks // splits) * block, block, warps


# ---- both --------------------------------------------------------------------------------------


def fold(sums: Tensor, weights: Sequence[Tensor], seeds: Seeds) -> list[Tensor]:
    """Gradients of `weights`: sums over programs, in the slots of the listed seeds."""
    make = torch.empty if seeds.everyone else torch.zeros
    own = make(sum(w.numel() for w in weights), device=sums.device, dtype=weights[0].dtype)
    parts = torch.split(own, [w.numel() for w in weights])
    folded = [part.view(w.shape) for part, w in zip(parts, weights, strict=True)]
    block = 256
    fold_kernel[(-(-sums[0].numel() // block),)](
        sums, *_named(folded, seeds), seeds.ids, seeds.slots, sums.shape[1], len(sums),
        C=seeds.layout.chunk, H=seeds.layout.hidden, P=seeds.numbers, BP=block, BN=8,
        CHUNK=seeds.form.chunk is not None, BIASES=seeds.form.biases, num_warps=4,
    )  # fmt: skip
    return folded


def _named(weights: Sequence[Tensor], seeds: Seeds) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w_chunk, b_in, w_out, b_out; any other in the place of one that the blueprint has not."""
    form, rest = seeds.form, list(weights)
    w_in = rest.pop(0) if form.chunk is not None else rest[0]
    if not form.biases:
        return w_in, rest[0], rest[0], rest[0]
    b_in, w_out, b_out = rest
    return w_in, b_in, w_out, b_out
