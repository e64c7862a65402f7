"""The HTML page: what it shows, that names cannot break it, and that it stays small."""

from __future__ import annotations

import itertools
import re
from xml.etree.ElementTree import Element

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_ray.lifecycle import ExtendedLifecycle
from esper_ray.picture import Health, Layer, Picture
from esper_ray.picture.page import DETAILED, page
from esper_ray.picture.style import HEALTHS, STATES, luminance
from esper_ray.picture.words import one, plain
from tests.picture.layers import Reader, drawings, layer, motley, picture

_BOX = re.compile(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-[\d.]+z")


def boxes(drawing: Element, of: str) -> list[tuple[float, float]]:
    """Left edge and width of each box in the paths of one class, from left to right."""
    paths = [p for p in drawing.iter("path") if p.get("class") == of]
    found = [(float(b[0]), float(b[2])) for p in paths for b in _BOX.findall(p.get("d", ""))]
    return sorted(found)


def test_every_chunk_is_a_box_to_scale_in_its_states_class() -> None:
    found = layer(3, 100, sizes=[50, 20, 30], lifecycle_state=[2, 7, 2], alpha=[0, 1, 0.5])
    (drawing,) = drawings(page(picture(found)))
    training, fossilized = boxes(drawing, "s2"), boxes(drawing, "s7")
    left, whole = training[0][0], 2 * training[0][1]
    assert training == [(left, whole / 2), (left + 0.7 * whole, 0.3 * whole)]
    assert fossilized == [(left + 0.5 * whole, 0.2 * whole)]
    assert boxes(drawing, "alpha") == [
        (left + 0.5 * whole, 0.2 * whole),
        (left + 0.7 * whole, 0.15 * whole),
    ]


def test_every_chunk_carries_its_letter_its_bounds_and_its_tooltip() -> None:
    found = motley(11, 44)
    (drawing,) = drawings(page(picture(found)))
    letters = "".join(text.text or "" for text in drawing.iter("text") if text.get("class"))
    assert sorted(letters) == sorted(look.letter for look in STATES.values())
    numbers = [text.text for text in drawing.iter("text") if not text.get("class")]
    assert sorted(numbers, key=lambda n: int(n or 0)) == [str(n) for n in range(0, 45, 4)]
    assert [tip.text for tip in drawing.iter("title")] == [one(chunk) for chunk in found.chunks]


def test_tooltip_tells_all_that_is_known() -> None:
    found = layer(
        1,
        5,
        lifecycle_state=[3],
        alpha=[0.25],
        error_count=[2],
        evaluation_score=[12],
        performance_metrics=[[2.5, 0.5, 0, 0]],
        metrics_valid=[3],
    )
    assert one(found.chunks[0]) == (
        "seed 0: features 0 to 5, GRAFTING, alpha 0.25, health ERRORS, errors 2, score 0.012, "
        "loss 2.5, accuracy 0.5"
    )


def test_health_is_drawn_taller_where_it_is_worse() -> None:
    found = layer(3, 3, error_count=[0, 1, 6])
    (drawing,) = drawings(page(picture(found)))
    heights = {
        path.get("class"): float(_BOX.findall(path.get("d", ""))[0][3])
        for path in drawing.iter("path")
        if path.get("class", "").startswith("h")
    }
    assert list(heights) == ["h0", "h3", "h4"]
    assert heights["h0"] < heights["h3"] < heights["h4"]


def test_key_names_every_state_with_its_letter_and_every_health() -> None:
    reader = Reader(page(picture(layer(1, 1))))
    named = reader.of("li")
    for state, health in itertools.zip_longest(ExtendedLifecycle, Health):
        assert state.name in named
        assert health is None or f"{health.name}: {HEALTHS[health].words}" in named


def test_table_tells_the_same_seed_by_seed() -> None:
    found = motley(11, 44)
    reader = Reader(page(picture(found)))
    assert reader.of("summary") == ["Table of 11 seeds"]
    header, cells = reader.of("th"), reader.of("td")
    width = len(header)
    cut = (cells[at : at + width] for at in range(0, len(cells), width))
    rows = [dict(zip(header, row, strict=True)) for row in cut]
    for row, chunk in zip(rows, found.chunks, strict=True):
        bounds = (row["seed"], row["from"], row["to"])
        assert bounds == (str(chunk.seed_id), str(chunk.start), str(chunk.stop))
        assert (row["state"], row["health"]) == (chunk.state.name, chunk.health.name)
        assert row["alpha"] == f"{chunk.alpha:.3g}"
        assert (row["loss"] == "-") == ("loss" not in chunk.metrics)


def test_table_of_many_seeds_takes_equal_ones_together() -> None:
    found = layer(5_000, 5_000, lifecycle_state=[0] * 2_000 + [2] * 3_000)
    reader = Reader(page(picture(found)))
    assert reader.of("summary") == ["Table of 5000 seeds as 2 runs of equal seeds"]
    assert reader.of("td")[:6] == ["0 to 1999", "0", "2000", "DORMANT", "0", "UNMEASURED"]


def test_table_of_too_many_runs_says_that_it_is_cut() -> None:
    (said,) = Reader(page(picture(motley(2_000, 2_000)))).of("summary")
    assert said == "Table of 2000 seeds as 2000 runs of equal seeds, the first 1000"


@given(name=st.text(max_size=30))
def test_no_name_breaks_the_page(name: str) -> None:
    drawn = Picture(name, name, (layer(2, 2, name),))
    reader = Reader(page(drawn))
    assert "".join(reader.of("h1")) == f"Chunks of {plain(name)}"
    assert "".join(reader.of("h2")).strip() == plain(name).strip()
    assert {tag for tag, _ in reader.tags} == {tag for tag, _ in Reader(PLAIN).tags}


PLAIN = page(picture(layer(2, 2)))


def test_markup_in_names_is_shown_as_text() -> None:
    nasty = "<script>alert('\"&amp;')</script>\x1b[31m"
    text = page(Picture(nasty, nasty, (layer(2, 2, nasty),)))
    assert "<script" not in text
    assert "\x1b" not in text
    assert Reader(text).of("h2") == [nasty.replace("\x1b", "?")]
    assert len(drawings(text)) == 1


def test_page_needs_nothing_but_itself() -> None:
    text = page(picture(motley(11, 44)))
    tags = Reader(text).tags
    assert {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in tags} == set()
    assert not any({"src", "href", "onclick", "onload"} & attrs.keys() for _, attrs in tags)
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme:dark" in text
    assert "default-src 'none'" in text


@pytest.mark.parametrize(
    "layers",
    [
        (motley(10_000, 10_000),),
        (motley(10_000, 40_960, "a"), motley(10_000, 10_007, "b"), motley(10_000, 20_000, "c")),
    ],
)
def test_ten_thousand_seeds_in_a_layer_stay_below_five_megabytes(
    layers: tuple[Layer, ...],
) -> None:
    text = page(picture(*layers))
    assert len(text.encode()) < 5_000_000
    for drawn, drawing in zip(layers, drawings(text), strict=True):
        cells = sum(len(boxes(drawing, f"s{state.value}")) for state in ExtendedLifecycle)
        assert cells == 10_000
        tips = [tip.text for tip in drawing.iter("title")]
        if len(layers) * 10_000 <= DETAILED:
            assert tips == [one(chunk) for chunk in drawn.chunks]
        else:
            assert (tips[0] or "").startswith("seeds 0 to ")
            assert len(tips) <= 100


def test_run_without_seeds_is_told_so() -> None:
    assert "No layer carries seeds." in Reader(page(picture())).of("p")


def test_states_are_told_apart_without_colour_and_read_on_their_fill() -> None:
    assert len({look.letter for look in STATES.values()}) == len(STATES) == len(ExtendedLifecycle)
    assert len({look.fill for look in STATES.values()}) == len(STATES)
    for look in STATES.values():
        light, dark = sorted((luminance(look.fill), luminance(look.ink)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5
    assert len({mark.height for mark in HEALTHS.values()}) == len(HEALTHS) == len(Health)
