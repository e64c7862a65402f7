"""Rows out of segments: whole ones checked by sha256, pieces of some seeds by crc32 and head."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from esper_ray.storage.layer_manifest import LayerSegment
from esper_ray.storage.layer_rows import Columns, LayerSchema, Rows, Tensors, check_keys
from esper_ray.storage.row_codec import (
    Head,
    Piece,
    decode_batch,
    decode_block,
    decode_table,
    decode_tensors,
    empty_table,
    empty_tensors,
    table_head,
    tensor_head,
)
from esper_ray.storage.segment_source import RangeRef, SegmentSource


def read_batches(
    source: SegmentSource,
    segments: Sequence[LayerSegment],
    schema: LayerSchema,
    seed_ids: NDArray[np.int64] | None = None,
) -> list[Rows]:
    """Rows of each commit that some segments come from, oldest first, of some seeds or all."""
    commits: dict[tuple[str, int], list[LayerSegment]] = {}
    for segment in segments:
        commits.setdefault((segment.level, segment.seq), []).append(segment)
    if seed_ids is None:
        return [_whole(source, parts, schema) for parts in commits.values()]
    wanted = {
        commit: [
            (segment, piece)
            for segment in parts
            for piece in segment.pieces
            if piece.may_hold(seed_ids)
        ]
        for commit, parts in commits.items()
    }
    every = [one for some in wanted.values() for one in some]
    # A piece alone does not tell its types: the head, which does, is fetched beside it.
    heads = {segment.ref: _head(segment, schema) for segment, _ in every}
    refs = [RangeRef(segment.ref, piece) for segment, piece in every]
    refs += [RangeRef(segment, head) for segment, head in heads.items()]
    fetched = iter(source.read_ranges(refs))
    return [
        _some([(segment.part, piece, next(fetched)) for segment, piece in some], schema, seed_ids)
        for some in wanted.values()
    ]


def _head(segment: LayerSegment, schema: LayerSchema) -> Head:
    if segment.part in schema.tables:
        return table_head(segment.pieces, schema.tables[segment.part])
    return tensor_head(segment.pieces, schema.tensors[segment.part])


def _whole(source: SegmentSource, segments: Sequence[LayerSegment], schema: LayerSchema) -> Rows:
    rows = no_rows(schema)
    for one in segments:
        data = source.read(one.ref)
        if one.part in schema.tables:
            rows.tables[one.part] = decode_table(data, one.pieces, schema.tables[one.part])
        else:
            rows.tensors[one.part] = decode_tensors(data, one.pieces, schema.tensors[one.part])
    check_keys(rows)
    return rows


def _some(
    pieces: Sequence[tuple[str, Piece, bytes]], schema: LayerSchema, seed_ids: NDArray[np.int64]
) -> Rows:
    """The rows of some seeds out of pieces (part, piece, its bytes) of one commit."""
    tables: dict[str, list[Columns]] = {}
    tensors: dict[str, list[Tensors]] = {}
    for part, piece, data in pieces:
        if part in schema.tables:
            table = decode_batch(data, piece, schema.tables[part])
            index = _places(table["seed_id"], seed_ids)
            tables.setdefault(part, []).append({n: v[index] for n, v in table.items()})
        else:
            block = decode_block(data, piece, schema.tensors[part])
            rows = torch.from_numpy(_places(block["seed_id"].numpy(), seed_ids))
            taken = {name: value.index_select(0, rows) for name, value in block.items()}
            tensors.setdefault(part, []).append(taken)
    found = no_rows(schema, {*tables, *tensors})
    for part, some in tables.items():
        found.tables[part] = _joined(some, np.concatenate)
    for part, blocks in tensors.items():
        found.tensors[part] = _joined(blocks, torch.cat)
    check_keys(found)
    return found


def _joined(parts: list[dict[str, Any]], join_all: Callable[[list[Any]], Any]) -> dict[str, Any]:
    if len(parts) == 1:
        return parts[0]
    return {name: join_all([part[name] for part in parts]) for name in parts[0]}


def _places(ids: NDArray[np.int32], seed_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    mask = ids == seed_ids[0] if len(seed_ids) == 1 else np.isin(ids, seed_ids)
    return np.flatnonzero(mask)


def no_rows(schema: LayerSchema, but: Collection[str] = ()) -> Rows:
    """Rows of no seed; parts `but` are left out."""
    return Rows(
        {p: empty_table(table) for p, table in schema.tables.items() if p not in but},
        {p: empty_tensors(table) for p, table in schema.tensors.items() if p not in but},
    )
