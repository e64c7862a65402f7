"""Manifests come back exactly, or not at all."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_ray.errors import CorruptError
from esper_ray.storage import manifest
from esper_ray.storage.manifest import LogRef, SegmentRef, decode, encode

HEX = hashlib.sha256(b"x").hexdigest()
REF = SegmentRef("stage0/host", f"sha256/{HEX[:2]}/{HEX}.arrow", HEX, 1, 3)
PART = LogRef(f"{2:08d}-{5:020d}.arrow", HEX, 1, 3)

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**127), 2**127)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=4), inner, max_size=3)
    ),
    max_leaves=12,
)
bodies = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=6), values, max_size=4)


def sealed(body: dict[str, Any]) -> bytes:
    return encode({"format": "esper-ckpt", **body})


@settings(max_examples=60, deadline=None)
@given(body=bodies)
def test_manifest_round_trip_is_exact(body: dict[str, Any]) -> None:
    full = {**body, "format": "esper-ckpt", "min_reader": 1}
    again = decode(encode(full))
    assert again == full
    assert encode(again) == encode(full)


@settings(max_examples=60, deadline=None)
@given(body=bodies, data=st.data())
def test_any_changed_byte_is_found(body: dict[str, Any], data: st.DataObject) -> None:
    stored = bytearray(encode({**body, "format": "esper-ckpt", "min_reader": 1}))
    at = data.draw(st.integers(0, len(stored) - 1))
    stored[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CorruptError):
        decode(bytes(stored))


def test_every_truncation_is_found() -> None:
    stored = sealed({"a": [1, 2.5, "x"]})
    for length in range(len(stored)):
        with pytest.raises(CorruptError):
            decode(stored[:length])


def test_bytes_are_canonical() -> None:
    assert encode({"b": 1, "a": "ü"}).startswith('{"a":"ü","b":1,"self_sha256":"'.encode())


def test_other_spelling_of_the_same_values_is_refused() -> None:
    body = json.loads(sealed({"a": 1}))
    with pytest.raises(CorruptError, match="not those"):
        decode(json.dumps(body).encode())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "not a JSON object"),
        ('{"a":1,"a":1}', "key twice"),
        ('{"a":NaN}', "number NaN"),
        ('{"a":-Infinity}', "number -Infinity"),
        ("{", "not JSON"),
        ('{"a":' + "9" * 65 + "}", "65 digits"),
        ('{"a":' + "[" * 70 + "]" * 70 + "}", "deep"),
        ("[" * 200_000, "not JSON"),
        ("{}", "no self_sha256"),
        ('{"self_sha256":"0","x":1e999}', "not canonical"),
        ('{"self_sha256":"0","x":"\\ud800"}', "not canonical"),
        ('{"self_sha256":"0"}', "not those"),
    ],
)
def test_hostile_json_is_refused(text: str, reason: str) -> None:
    with pytest.raises(CorruptError, match=reason):
        decode(text.encode())


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(CorruptError, match="not JSON"):
        decode(b"\xff\xfe")


def test_oversized_manifest_is_refused_unparsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "MAX_BYTES", 10)
    with pytest.raises(CorruptError, match="at most 10"):
        decode(b"[" * 11)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"format": "other"}, "format is 'other'"),
        ({}, "format is None"),
        ({"format": "esper-ckpt", "min_reader": 2}, "newer version"),
        ({"format": "esper-ckpt", "min_reader": "1"}, "which never was"),
        ({"format": "esper-ckpt", "min_reader": 0}, "which never was"),
    ],
)
def test_manifest_of_another_format_or_version_is_refused(
    body: dict[str, Any], reason: str
) -> None:
    with pytest.raises(CorruptError, match=reason):
        decode(encode(body))


@pytest.mark.parametrize(
    "body",
    [
        {"a": float("nan")},
        {1: 1, "1": 2},
        {"self_sha256": "x"},
        {"a": 10**100},
        {"a": "\ud800"},
    ],
)
def test_body_that_could_not_be_read_back_is_not_written(body: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        encode(body)


def test_segment_reference_round_trip() -> None:
    assert SegmentRef.from_json(json.loads(json.dumps(REF.to_json()))) == REF
    assert REF.path == f"segments/sha256/{HEX[:2]}/{HEX}.arrow"


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../../etc/passwd"},
        {"file": f"sha256/{HEX[:2]}/../{HEX}.arrow"},
        {"file": f"/sha256/{HEX[:2]}/{HEX}.arrow"},
        {"file": f"sha256/{HEX[:2]}/{HEX}.arrow\n"},
        {"file": f"sha256/{HEX[:2]}/{HEX}.pt"},
        {"file": f"sha256/zz/{HEX}.arrow"},
        {"file": f"sha256/00/{HEX}.arrow"},
        {"file": f"s3://bucket/sha256/{HEX[:2]}/{HEX}.arrow"},
        {"file": 5},
        {"sha256": "0" * 64},
        {"sha256": None},
        {"size": -1},
        {"size": True},
        {"size": 2**63},
        {"rows": 1.0},
        {"name": ""},
        {"name": "x" * 1025},
        {"name": 1},
        {"extra": 1},
    ],
)
def test_forged_segment_reference_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CorruptError):
        SegmentRef.from_json({**REF.to_json(), **change})


@pytest.mark.parametrize(
    "body",
    [{}, {"segments": {}}, {"segments": [1]}, {"segments": [REF.to_json(), REF.to_json()]}],
)
def test_malformed_segment_list_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(CorruptError):
        manifest.segments(body)


def test_segment_list_is_read_in_order() -> None:
    assert manifest.segments({"segments": [REF.to_json()]}) == [REF]


def test_log_reference_round_trip() -> None:
    assert LogRef.from_json(json.loads(json.dumps(PART.to_json()))) == PART
    assert PART.path == "log/00000002-00000000000000000005.arrow"
    assert PART.file == manifest.log_file(2, 5)


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../../etc/passwd"},
        {"file": f"../{PART.file}"},
        {"file": f"/{PART.file}"},
        {"file": f"log/{PART.file}"},
        {"file": f"{PART.file}\n"},
        {"file": f"{PART.file}.tmp"},
        {"file": PART.file.replace("5", "\N{ARABIC-INDIC DIGIT FIVE}")},
        {"file": 5},
        {"sha256": HEX[1:]},
        {"sha256": HEX.upper()},
        {"sha256": None},
        {"size": -1},
        {"size": True},
        {"size": 2**63},
        {"rows": 1.0},
        {"rows": None},
        {"extra": 1},
    ],
)
def test_forged_log_reference_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CorruptError, match="log part"):
        LogRef.from_json({**PART.to_json(), **change})


def test_manifest_names_its_own_part_of_the_log_or_none() -> None:
    body = {"run_epoch": 2, "seq": 5, "segments": [REF.to_json()], "log": PART.to_json()}
    assert manifest.log_part(body) == PART
    assert manifest.references(body) == [REF, PART]
    del body["log"]
    assert manifest.log_part(body) is None
    assert manifest.references(body) == [REF]


@pytest.mark.parametrize(
    "change",
    [{"seq": 6}, {"run_epoch": 1}, {"seq": "5"}, {"run_epoch": None}, {"log": None}, {"log": []}],
)
def test_part_of_another_commit_is_refused(change: dict[str, Any]) -> None:
    body = {"run_epoch": 2, "seq": 5, "log": PART.to_json(), **change}
    with pytest.raises(CorruptError):
        manifest.log_part(body)
