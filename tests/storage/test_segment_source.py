"""Where segments are read from: memory, nearer roots, the root; and what memory keeps."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from esper_ray.errors import CorruptError, StorageUnavailable
from esper_ray.storage import Root, objects
from esper_ray.storage.acknowledgement import SaveFuture
from esper_ray.storage.groups import SeedGroup
from esper_ray.storage.manifest import SegmentRef
from esper_ray.storage.recent_groups import RecentGroups
from esper_ray.storage.row_codec import Piece
from esper_ray.storage.seed_record import SeedRow
from esper_ray.storage.segment_source import RangeRef, SegmentMemory, SegmentSource
from tests.storage.layer_cases import SCHEMA, FaultyRoot

DATA = bytes(range(200))


def put(root: Root) -> SegmentRef:
    return objects.put_segment(root, "x", DATA, "arrow", 1)


def test_memory_drops_what_was_not_used_for_longest() -> None:
    memory = SegmentMemory(limit=10)
    for name in "abc":
        memory.put(name, b"1234")
        memory.get("a")
    assert [name for name in "abc" if memory.get(name) is not None] == ["a", "c"]
    memory.put("large", b"1" * 11)
    assert memory.get("large") is None


def test_recent_groups_drop_the_oldest() -> None:
    groups = []
    for seq in range(3):
        group = SeedGroup(seq, SCHEMA, SaveFuture("durable-local"))
        group.add(seq, SeedRow(SCHEMA, {}, None))
        groups.append(group)
    recent = RecentGroups(limit=2 * groups[0].held_bytes)
    for group in groups:
        recent.keep(group)
    assert [recent.find(seq, 0) is not None for seq in range(3)] == [False, True, True]
    assert recent.find(2, 1) is None


def test_a_segment_that_only_the_far_root_has_is_kept_near(tmp_path: Path) -> None:
    near, far = Root.open(str(tmp_path / "near")), Root.open(str(tmp_path / "far"))
    ref = put(far)
    assert SegmentSource([near, far]).read(ref) == DATA
    far.replace(ref.path, b"damaged")
    assert SegmentSource([near, far]).read(ref) == DATA
    near.replace(ref.path, DATA[::-1])
    with pytest.raises(CorruptError):
        SegmentSource([near, far]).read(ref)
    far.replace(ref.path, DATA)
    assert SegmentSource([near, far]).read(ref) == DATA  # and heals the near copy
    assert objects.read_object(near, ref) == DATA


def test_a_near_root_that_takes_nothing_is_no_reason_to_fail(tmp_path: Path) -> None:
    near, far = FaultyRoot.new(), Root.open(str(tmp_path))
    near.refusals = 5
    assert SegmentSource([near, far]).read(put(far)) == DATA
    assert near.refusals == 4


def test_pieces_come_from_memory_or_from_the_first_root_that_has_them(tmp_path: Path) -> None:
    near, far = Root.open(str(tmp_path / "near")), Root.open(str(tmp_path / "far"))
    ref = put(far)
    whole = RangeRef(ref, Piece(1, 0, 0, 10, 20, zlib.crc32(DATA[10:30])))
    assert SegmentSource([near, far]).read_ranges([whole, whole]) == [DATA[10:30]] * 2
    source = SegmentSource([near, far])
    source.read(ref)
    far.replace(ref.path, b"short")
    assert source.read_ranges([whole]) == [DATA[10:30]]
    near.replace(ref.path, b"short")
    with pytest.raises(CorruptError, match="ends before"):
        SegmentSource([near, far]).read_ranges([whole])
    gone = RangeRef(SegmentRef("x", f"sha256/00/{'0' * 64}.arrow", "0" * 64, 9), whole.part)
    with pytest.raises(CorruptError, match="missing"):
        SegmentSource([near, far]).read_ranges([gone])
    assert SegmentSource([near]).read_ranges([]) == []


def test_a_store_that_does_not_answer_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    root = Root.open(str(tmp_path / "file" / "run"))
    ref = SegmentRef("x", f"sha256/00/{'0' * 64}.arrow", "0" * 64, 9)
    with pytest.raises((CorruptError, StorageUnavailable)):
        SegmentSource([root]).read(ref)
