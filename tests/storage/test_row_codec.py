"""Rows as segments: every piece read alone is what it is in the whole, or refused."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_ray.errors import CorruptError
from esper_ray.storage import row_codec, tensor_blocks
from esper_ray.storage.layer_rows import Rows, check_keys, newest
from esper_ray.storage.row_codec import Encoded, Piece
from esper_ray.storage.tensor_header import DTYPE_NAMES
from tests.builders import same_bits
from tests.storage.layer_cases import SCHEMA, rows_of, same

KINDS = sorted(DTYPE_NAMES, key=str)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 200),
    specs=st.lists(
        st.tuples(st.sampled_from(KINDS), st.lists(st.integers(0, 3), max_size=3)),
        min_size=1,
        max_size=6,
    ),
)
def test_blocks_are_safetensors_and_come_back_bit_for_bit(
    rows: int, specs: list[tuple[torch.dtype, list[int]]]
) -> None:
    schema = {f"t{n}": (kind, tuple(shape)) for n, (kind, shape) in enumerate(specs)}
    schema["seed_id"] = (torch.int32, ())  # every part has its keys, so no row is without bytes
    random = torch.Generator().manual_seed(rows)
    tensors = {
        name: torch.randint(0, 2, (rows, *shape), generator=random).to(kind)
        for name, (kind, shape) in schema.items()
    }
    order = tensor_blocks.specs_of(schema)
    data = tensor_blocks.encode_blocks(tensors, order)
    assert data == tensor_blocks.encode_blocks({n: v.clone() for n, v in tensors.items()}, order)
    found = tensor_blocks.decode_blocks(data, order, rows)
    assert all(same_bits(value, found[name]) for name, value in tensors.items())
    theirs = safetensors.torch.load(data)
    for name, value in tensors.items():
        blocks = [theirs[key] for key in sorted(theirs) if key.endswith(f"/{name}")]
        assert same_bits(torch.cat(blocks), value)
    for number, (offset, length) in enumerate(tensor_blocks.block_ranges(order, rows)):
        start = number * tensor_blocks.BLOCK_ROWS
        count = min(tensor_blocks.BLOCK_ROWS, rows - start)
        one = tensor_blocks.decode_block(data[offset : offset + length], order, count)
        assert all(same_bits(v[start : start + count], one[n]) for n, v in tensors.items())


@pytest.mark.parametrize("batch_rows", [64, 1024])
def test_every_piece_is_the_same_alone_as_in_the_whole(batch_rows: int) -> None:
    rows = rows_of(range(3_000))
    for one in row_codec.encode(rows, SCHEMA, batch_rows):
        start = 0
        for piece in one.pieces:
            data = one.data[piece.offset : piece.offset + piece.length]
            assert zlib.crc32(data) == piece.crc32
            index = slice(start, start + piece.rows)
            if one.part in SCHEMA.tables:
                table = row_codec.decode_batch(data, piece, SCHEMA.tables[one.part])
                assert all(
                    np.array_equal(value, rows.tables[one.part][name][index])
                    for name, value in table.items()
                )
                assert (table["seed_id"][0], table["seed_id"][-1]) == (piece.first, piece.last)
            else:
                block = row_codec.decode_block(data, piece, SCHEMA.tensors[one.part])
                assert all(
                    torch.equal(value, rows.tensors[one.part][name][index])
                    for name, value in block.items()
                )
            start += piece.rows
        assert start == one.rows


def encoded(part: str) -> Encoded:
    [one] = [one for one in row_codec.encode(rows_of(range(200)), SCHEMA) if one.part == part]
    return one


def test_mutated_tensors_keep_the_shape_or_are_refused() -> None:
    one, random = encoded("weights"), np.random.default_rng(1)
    whole = row_codec.decode_tensors(one.data, one.pieces, SCHEMA.tensors["weights"])
    for _ in range(300):
        bad = bytearray(one.data)
        for at in random.integers(0, len(bad), random.integers(1, 4)):
            bad[at] ^= 1 << random.integers(0, 8)
        try:
            found = row_codec.decode_tensors(bytes(bad), one.pieces, SCHEMA.tensors["weights"])
        except CorruptError:
            continue
        assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in whole.items()}
    for size in (0, 7, 8, len(one.data) - 1):
        with pytest.raises(CorruptError, match="not that of 100 rows"):
            row_codec.decode_tensors(one.data[:size], one.pieces, SCHEMA.tensors["weights"])
    with pytest.raises(CorruptError, match="has not 3 bytes"):
        row_codec.decode_block(b"abc", one.pieces[0], SCHEMA.tensors["weights"])


def test_a_forged_piece_is_refused() -> None:
    right = encoded("state").pieces[0].to_json()
    assert Piece.from_json(right, 10**6).to_json() == right
    forged: list[Callable[[list[object]], object]] = [
        lambda piece: piece.pop(),
        lambda piece: piece.__setitem__(0, 0),
        lambda piece: piece.__setitem__(0, True),
        lambda piece: piece.__setitem__(3, -1),
        lambda piece: piece.__setitem__(4, 10**7),
        lambda piece: piece.__setitem__(5, 1.0),
        lambda piece: piece.__setitem__(6, [None]),
        lambda piece: piece.__setitem__(6, 3),
    ]
    for change in forged:
        bad = list(right)
        change(bad)
        with pytest.raises(CorruptError, match="piece"):
            Piece.from_json(bad, 10**6)
    with pytest.raises(CorruptError, match="malformed"):
        Piece.from_json({"rows": 1}, 10)


def test_a_row_that_comes_twice_or_has_no_state_is_refused() -> None:
    rows = rows_of([2, 3, 4])
    twice = Rows(
        {p: {n: np.concatenate([v, v]) for n, v in t.items()} for p, t in rows.tables.items()}
    )
    with pytest.raises(CorruptError, match="twice"):
        check_keys(twice)
    state = {name: value[:1] for name, value in rows.tables["state"].items()}
    with pytest.raises(CorruptError, match="without a state"):
        check_keys(Rows({**rows.tables, "state": state}, rows.tensors))


def test_the_last_batch_decides_about_all_parts_of_a_seed() -> None:
    older, newer = rows_of(range(6)), rows_of([0, 2], seed=1, weights=False)
    found = newest([older, newer])
    assert found.seed_ids.tolist() == list(range(6))
    assert found.tensors["weights"]["seed_id"].tolist() == [4]
    assert found.tables["grafting"]["seed_id"].tolist() == [0, 3]
    assert same(newest([newer, older]), older)
    assert same(newest([older, older]), older)
