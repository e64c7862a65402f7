"""The PNG: an image of plausible size, or the name of the extra that is missing."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from matplotlib import image

from esper_ray.errors import ConfigError
from esper_ray.picture import png as module
from esper_ray.picture.png import png
from esper_ray.picture.style import STATES
from tests.picture.layers import layer, motley, picture

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def pixels(data: bytes) -> np.ndarray:
    """(height, width, channels), 0 to 1."""
    assert data.startswith(SIGNATURE)
    return np.asarray(image.imread(io.BytesIO(data)))


def test_picture_is_an_image_of_plausible_size() -> None:
    one = pixels(png(picture(motley(11, 44))))
    two = pixels(png(picture(motley(11, 44), motley(11, 44))))
    assert one.shape[1] == two.shape[1] == 1440
    assert 200 < one.shape[0] < two.shape[0] < 1440


def test_state_fills_as_many_pixels_as_its_chunks_are_wide() -> None:
    def filled(wide: int) -> int:
        found = layer(2, 100, sizes=[wide, 100 - wide], lifecycle_state=[2, 7])
        fill = [int(STATES[found.chunks[0].state].fill[at : at + 2], 16) for at in (1, 3, 5)]
        seen = np.round(pixels(png(picture(found)))[:, :, :3] * 255)
        return int((np.abs(seen - fill).max(axis=2) < 2).sum())

    key = filled(1)
    assert (filled(80) - key) / (filled(40) - key) == pytest.approx(79 / 39, rel=0.05)


def test_names_are_no_formulas() -> None:
    nasty = "a$\\frac{x}$_b\x07"
    assert pixels(png(picture(layer(2, 4, nasty)))).size


def test_run_without_seeds_is_an_image_too() -> None:
    assert pixels(png(picture())).size


def test_ten_thousand_seeds_are_an_image_that_can_be_opened() -> None:
    seen = pixels(png(picture(motley(10_000, 10_000))))
    assert 3_000 < seen.shape[0] < 2**15


def test_very_many_layers_are_drawn_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_PIXELS", 2_000)
    seen = pixels(png(picture(*(layer(1, 1, f"layer {n}") for n in range(40)))))
    assert 1_990 <= seen.shape[0] <= 2_000


@pytest.mark.parametrize("part", ["matplotlib.figure", "matplotlib.backends.backend_agg"])
def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    monkeypatch.setitem(sys.modules, part, None)
    with pytest.raises(ConfigError, match="needs matplotlib") as caught:
        png(picture())
    assert caught.value.hint == "pip install 'esper-ray[report]'"
