"""Events on the wire: read back bit for bit, and by a library that is not ours."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from cloudevents.v1.http import from_json
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_ray.errors import CorruptError, TooNewError
from esper_ray.events import cloud
from esper_ray.events.event import Event, Kind, decoded, encoded
from esper_ray.events.log import EventKind, Events

TIME = "2026-11-26T01:02:03.000004Z"
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, width=64)
    .filter(lambda x: abs(x) != float("inf")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
layers = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
counts = st.integers(0, 2**31)


def table(data: Any, layer: str = "a.b", **given: Any) -> Event:
    return Event(Kind.FAULT, "digits", layer, 1, 2, TIME, data, **given)


def batch(layer: str = "a.b", rows: int = 3) -> Event:
    data = Events.build(
        EventKind.TRANSITION,
        layer,
        5,
        6,
        7,
        rows,
        seed_id=np.arange(rows),
        generation=2,
        from_state=1,
        to_state=2,
        cause="POLICY",
        score=np.linspace(np.nan, 1, rows),
        gate='{"inputs":{},"name":"g","thresholds":{},"verdict":"accepted"}',
    )
    return Event(Kind.TRANSITION, "digits", layer, 1, 5, TIME, data, shard=1, incarnation=3)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text(), json_values, max_size=4), layers, counts, counts, st.none() | counts
)
def test_every_table_comes_back_with_its_types(
    data: dict[str, Any], layer: str, shard: int, incarnation: int, seed_id: int | None
) -> None:
    event = table(data, layer, shard=shard, incarnation=incarnation, seed_id=seed_id)
    assert cloud.decode(cloud.encode(event)) == event


@given(layers)
def test_layer_id_is_one_word_without_dots(layer: str) -> None:
    assert not {".", "/", " "} & set(encoded(layer))
    assert decoded(encoded(layer)) == layer


@pytest.mark.parametrize("layer", ["a", "b.c", "Ebene ü/1", "层.%2E"])
def test_batch_of_transitions_comes_back_bit_for_bit(layer: str) -> None:
    event = batch(layer)
    again = cloud.decode(cloud.encode(event))
    assert again == event
    assert cloud.encode(again) == cloud.encode(event)


def test_rows_of_a_batch_are_events_of_their_own() -> None:
    event = batch()
    one = cloud.single(event, 1)
    assert one.id == f"{event.id}/1"
    assert isinstance(one.data, dict)
    assert (one.data["from_state"], one.data["gate"]["verdict"]) == (1, "accepted")
    assert cloud.single(event, 0).data["score"] is None  # type: ignore[index]
    assert cloud.decode(cloud.encode(one)) == one


@pytest.mark.parametrize("event", [table({"n": 1, "t": "ü"}), batch(), cloud.single(batch(), 2)])
def test_a_reader_of_cloudevents_takes_them(event: Event) -> None:
    data = cloud.encode(event)
    core = JSONFormat().read(CloudEvent, data)
    assert (core.get_id(), core.get_source()) == (event.id, "esper-ray://digits/a%2Eb")
    assert core.get_type() == f"io.esper_ray.{event.kind}.v1"
    assert core.get_extension("sequence") == str(event.sequence)
    known = from_json(data)
    assert known["id"] == event.id
    if isinstance(event.data, Events):
        assert bytes(core.get_data()) == cloud._arrow(event)  # type: ignore[arg-type]
    else:
        assert core.get_data() == event.data


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"specversion": "0.3"}, "no CloudEvent"),
        ({"id": "other"}, "its id is not"),
        ({"source": "esper-ray://No Run/a"}, "source"),
        ({"source": "esper-ray://digits/a.b"}, "no encoded layer"),
        ({"type": "com.other"}, "its type"),
        ({"sequence": "-1"}, "no number"),
        ({"sequence": 2}, "cannot be read"),
        ({"time": "yesterday"}, "its time"),
        ({"datacontenttype": "text/plain"}, "its data are"),
        ({"data": [1]}, "no table"),
        ({"datacontenttype": cloud.ARROW_TYPE, "data_base64": "AAAA"}, "cannot be read|schema"),
    ],
)
def test_what_is_not_ours_is_refused(change: dict[str, Any], why: str) -> None:
    told = json.loads(cloud.encode(table({"n": 1})))
    with pytest.raises(CorruptError, match=why):
        cloud.decode(json.dumps({**told, **change}).encode())


@pytest.mark.parametrize("name", ["io.esper_ray.run.fault.v2", "io.esper_ray.run.unheard.v1"])
def test_newer_version_says_so(name: str) -> None:
    told = json.loads(cloud.encode(table({"n": 1})))
    with pytest.raises(TooNewError, match="not known here"):
        cloud.decode(json.dumps({**told, "type": name}).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b"null"])
def test_what_is_no_event_is_corrupt(data: bytes) -> None:
    with pytest.raises(CorruptError):
        cloud.decode(data)


def test_topics_are_those_of_the_page() -> None:
    assert batch().topic == "morphogenetic.digits.event.transition.layer.a%2Eb"
    assert table({}, "").topic == "morphogenetic.digits.event.run"
