"""Random numbers as a pure function of a key: nothing to save, nothing that order can change.

The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), evaluated at explicit counters,
so a seed's numbers do not depend on which other seeds draw, on which actor, or on the device.
"""

from __future__ import annotations

import hashlib
from typing import Final

import torch
from torch import Tensor

_GOLDEN: Final = 0x9E3779B97F4A7C15 - 2**64
_MIX_1: Final = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2: Final = 0x94D049BB133111EB - 2**64


def stream_key(*parts: object) -> int:
    """Signed 64-bit key of a stream named by `parts`, such as (run seed, "batch", step)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def reseed(key: int) -> None:
    """Start torch's own generators anew, for code that draws from them (initialisation, dropout).

    `torch.manual_seed` would queue a call with a stack trace for every use before CUDA starts.
    """
    torch.default_generator.manual_seed(key)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(key)


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts int64 arithmetically


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def keyed_bits(key: int, rows: Tensor, count: int) -> Tensor:
    """(rows, count) int64 of 64 random bits each; row r depends on `key` and `rows[r]` only."""
    counters = torch.arange(1, count + 1, dtype=torch.int64, device=rows.device)
    starts = _mix(rows.to(torch.int64) * _GOLDEN + key)
    return _mix(starts[:, None] + counters * _GOLDEN)


def keyed_uniform(key: int, rows: Tensor, count: int) -> Tensor:
    """(rows, count) float32, uniform in [0, 1) with 24 random bits."""
    return _shift(keyed_bits(key, rows, count), 40).to(torch.float32) * 2.0**-24


def keyed_integers(key: int, count: int, high: int) -> Tensor:
    """(count,) int64, uniform in [0, high); the modulo bias is below high / 2**63."""
    row = torch.zeros(1, dtype=torch.int64)
    return _shift(keyed_bits(key, row, count), 1)[0] % high
