"""Data sets are found on this machine, split by document, and the same on every read."""

from __future__ import annotations

import hashlib
import socket
import sys
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_ray import data
from esper_ray.data import SPLITS, ByteSplit, Dataset, TableSplit, split_of
from esper_ray.errors import ConfigError

CAP = 200_000


def documents() -> list[bytes]:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [text.encode() for _, text in sorted(topics.items())] + [f.read_bytes() for f in files]


def text_of(dataset: Dataset, name: str) -> bytes:
    split = dataset.split(name)
    assert isinstance(split, ByteSplit)
    return split.text.numpy().tobytes()


@pytest.fixture(scope="module")
def stdlib() -> Dataset:
    return data.load("stdlib_text", window=8, cap_bytes=CAP)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.load("digits")


def test_lesson_51_every_document_lies_in_one_split(stdlib: Dataset) -> None:
    parts: dict[str, list[bytes]] = {name: [] for name in SPLITS}
    room = CAP
    for content in documents():
        parts[split_of(content)].append(content[:room])
        room = max(0, room - len(content))
    assert {n: text_of(stdlib, n) for n in SPLITS} == {n: b"".join(parts[n]) for n in SPLITS}


def test_splits_are_five_to_one_to_one() -> None:
    names = [split_of(str(i).encode()) for i in range(7_000)]
    assert {name: round(names.count(name) / 1_000) for name in SPLITS} == {
        "train": 5,
        "gate": 1,
        "test": 1,
    }


def test_the_card_tells_what_was_read(stdlib: Dataset) -> None:
    texts = [text_of(stdlib, name) for name in SPLITS]
    assert stdlib.card.sha256 == hashlib.sha256(b"".join(texts)).hexdigest()
    assert dict(stdlib.card.splits) == dict(zip(SPLITS, map(len, texts), strict=True))
    assert stdlib.card.bytes == sum(map(len, texts)) == CAP
    assert (stdlib.card.name, stdlib.card.metric) == ("stdlib_text", "bits_per_byte")
    assert "standard library" in stdlib.card.source


def test_a_second_read_is_the_same(stdlib: Dataset) -> None:
    again = data.load("stdlib_text", window=8, cap_bytes=CAP)
    assert again.card == stdlib.card
    assert all(text_of(again, name) == text_of(stdlib, name) for name in SPLITS)


@pytest.mark.parametrize("cap", [60_000, 60_001, 123_457])
def test_the_cap_is_the_number_of_bytes_read(cap: int) -> None:
    assert data.load("stdlib_text", cap_bytes=cap).card.bytes == cap


def test_a_smaller_cap_reads_the_start_of_the_same_text(stdlib: Dataset) -> None:
    smaller = data.load("stdlib_text", cap_bytes=100_000)
    assert all(text_of(stdlib, n).startswith(text_of(smaller, n)) for n in SPLITS)
    assert smaller.card.sha256 != stdlib.card.sha256


@pytest.mark.parametrize("name", ["stdlib_text", "digits"])
def test_no_data_set_opens_a_socket(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a data set opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert data.load(name).card.bytes > 0


def test_a_window_is_followed_by_its_next_byte(stdlib: Dataset) -> None:
    text = text_of(stdlib, "gate")
    x, y = stdlib.gate.take(torch.tensor([0, 5, len(stdlib.gate) - 1]))
    assert x.dtype == y.dtype == torch.int64
    for row, first in enumerate([0, 5, len(text) - 9]):
        assert bytes(x[row].tolist()) == text[first : first + 8]
        assert int(y[row]) == text[first + 8]


def test_batches_visit_every_sample_once_and_keep_the_last_ones(digits: Dataset) -> None:
    batches = list(digits.gate.batches(50))
    assert [len(y) for _, y in batches[:-1]] == [50] * (len(batches) - 1)
    assert sum(len(y) for _, y in batches) == len(digits.gate)
    everything = digits.gate.take(torch.arange(len(digits.gate)))
    assert torch.equal(torch.cat([x for x, _ in batches]), everything[0])
    assert torch.equal(torch.cat([y for _, y in batches]), everything[1])


@settings(max_examples=20, deadline=None)
@given(step=st.integers(0, 10**9), seed=st.integers(0, 10**9))
def test_a_draw_depends_on_its_key_only(step: int, seed: int) -> None:
    split = data.load("digits").train
    x, y = split.draw(16, seed, "batch", step)
    torch.manual_seed(step)
    again_x, again_y = split.draw(16, seed, "batch", step)
    assert torch.equal(x, again_x)
    assert torch.equal(y, again_y)
    other, _ = split.draw(16, seed, "batch", step + 1)
    assert not torch.equal(x, other)


def test_draws_reach_every_sample() -> None:
    split = ByteSplit(torch.arange(40, dtype=torch.uint8), window=4)
    x, _ = split.draw(2_000, "coverage")
    assert sorted(set(x[:, 0].tolist())) == list(range(36))


def test_digits_are_whole_and_scaled(digits: Dataset) -> None:
    parts = [digits.split(name) for name in SPLITS]
    assert sum(map(len, parts)) == 1_797
    assert min(map(len, parts)) > 150
    contents = b""
    for part in parts:
        assert isinstance(part, TableSplit)
        assert part.features.shape == (len(part), 64)
        assert (float(part.features.min()), float(part.features.max())) == (0.0, 1.0)
        assert set(part.classes.tolist()) == set(range(10))
        contents += part.features.numpy().tobytes() + part.classes.numpy().tobytes()
    assert digits.card.sha256 == hashlib.sha256(contents).hexdigest()
    assert digits.card.bytes == len(contents)


def test_lesson_51_equal_digits_lie_in_one_split(digits: Dataset) -> None:
    owners: dict[bytes, str] = {}
    for name in SPLITS:
        part = digits.split(name)
        assert isinstance(part, TableSplit)
        for row in part.features:
            assert owners.setdefault(row.numpy().tobytes(), name) == name


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match="needs scikit-learn") as caught:
        data.load("digits")
    assert caught.value.hint == "pip install 'esper-ray[demo]'"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no data set is named 'imagenet'") as caught:
        data.load("imagenet")
    assert caught.value.hint == "choose one of: stdlib_text, digits"


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"window": 0}, "window 0"),
        ({"window": -3}, "window -3"),
        ({"window": 2.5}, "window 2.5"),
        ({"window": "8"}, "window '8'"),
        ({"window": True}, "window True"),
        ({"cap_bytes": 999}, "cap_bytes 999"),
        ({"cap_bytes": 1e5}, "cap_bytes 100000.0"),
        ({"cap_bytes": None}, "cap_bytes None"),
        ({"cap_bytes": 1_000}, "cap_bytes 1000 leaves a split empty"),
        ({"colour": 1}, "unexpected keyword argument 'colour'"),
    ],
)
def test_bad_arguments_are_named(args: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        data.load("stdlib_text", **args)


def test_digits_take_no_arguments() -> None:
    with pytest.raises(ConfigError, match=r"data set 'digits'.*unexpected keyword"):
        data.load("digits", window=8)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 300), count=st.integers(1, 400))
def test_lesson_51_spread_positions_are_different_and_span_the_split(
    length: int, count: int
) -> None:
    positions = ByteSplit(torch.zeros(length + 4, dtype=torch.uint8), 4).spread(count).tolist()
    assert len(positions) == len(set(positions)) == min(length, count)
    assert positions == sorted(positions)
    assert positions[0] == 0
    gaps = {b - a for a, b in zip(positions, [*positions[1:], length], strict=True)}
    assert max(gaps) - min(gaps) <= 1
