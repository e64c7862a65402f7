"""The picture as a PNG, drawn by matplotlib, which the `report` extra installs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from esper_ray.errors import ConfigError
from esper_ray.picture.rows import Chunk, Layer, Picture, lines
from esper_ray.picture.style import HEALTHS, STATES
from esper_ray.picture.words import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH_IN, _LINE_IN, _NAME_IN, _KEY_IN = 12.0, 0.52, 0.42, 1.9
_DPI: Final = 120
_MOST_PIXELS: Final = 2**15  # of a side; beyond twice as many matplotlib refuses
_LETTERS: Final = 1_500
"""Seeds of a picture up to which each has a letter."""


def png(picture: Picture) -> bytes:
    """The file's bytes; ConfigError names the extra if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "a .png needs matplotlib, which is not installed", "pip install 'esper-ray[report]'"
        ) from error
    cut = [lines(layer) for layer in picture.layers]
    inches = _NAME_IN * len(cut) + _LINE_IN * sum(map(len, cut))
    height = inches + _KEY_IN
    figure = Figure(figsize=(_WIDTH_IN, height), dpi=min(_DPI, _MOST_PIXELS / height))
    FigureCanvasAgg(figure)
    key = figure.add_axes((0.0, inches / height, 1.0, _KEY_IN / height))
    _draw_key(key, picture)
    axes = figure.add_axes((0.0, 0.0, 1.0, inches / height))
    axes.set(xlim=(-0.07, 1.07), ylim=(max(inches, _NAME_IN), 0.0))
    axes.axis("off")
    top = 0.0
    for layer, layer_lines in zip(picture.layers, cut, strict=True):
        _draw_layer(axes, layer, layer_lines, top, letters=picture.seeds <= _LETTERS)
        top += _NAME_IN + _LINE_IN * len(layer_lines)
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _draw_key(axes: Axes, picture: Picture) -> None:
    axes.set(xlim=(-0.07, 1.07), ylim=(_KEY_IN, 0.0))
    axes.axis("off")
    _write(axes, 0.0, 0.2, f"Chunks of {plain(picture.title)}", size=13, weight="bold")
    _write(axes, 0.0, 0.43, plain(picture.source), size=9)
    for at, (state, look) in enumerate(STATES.items()):
        x, y = (at % 6) / 6, 0.65 + at // 6 * 0.28
        _boxes(axes, [(x, 0.018)], y, 0.2, look.fill)
        _write(axes, x + 0.009, y + 0.1, look.letter, color=look.ink, ha="center", weight="bold")
        _write(axes, x + 0.025, y + 0.1, state.name, size=8)
    for at, (health, mark) in enumerate(HEALTHS.items()):
        x = at / 6
        _boxes(axes, [(x, 0.018)], 1.45 - 0.18 * mark.height, 0.18 * mark.height, mark.fill)
        _write(axes, x + 0.025, 1.36, health.name, size=8)
    told = "box: chunk, to scale, in its state's colour; above it health; below it alpha, 0 to 1"
    _write(axes, 0.0, 1.66, told, size=8)


def _draw_layer(
    axes: Axes, layer: Layer, cut: Sequence[Sequence[Chunk]], top: float, letters: bool
) -> None:
    name = f"{plain(layer.layer_id)}: {layer.width} features, {len(layer.chunks)} seeds"
    _write(axes, 0.0, top + 0.24, name, size=10, weight="bold")
    widest = max((line[-1].stop - line[0].start for line in cut), default=1)
    for row, line in enumerate(cut):
        _draw_line(axes, line, widest, top + _NAME_IN + row * _LINE_IN, letters)


def _draw_line(axes: Axes, line: Sequence[Chunk], widest: int, top: float, letters: bool) -> None:
    first = line[0].start
    spans = [((c.start - first) / widest, (c.stop - c.start) / widest) for c in line]
    whole = (0.0, (line[-1].stop - first) / widest)
    for state, look in STATES.items():
        own = [span for span, c in zip(spans, line, strict=True) if c.state is state]
        _boxes(axes, own, top + 0.09, 0.2, look.fill, edge="#ffffff")
    for health, mark in HEALTHS.items():
        own = [span for span, c in zip(spans, line, strict=True) if c.health is health]
        _boxes(axes, own, top + 0.08 - 0.08 * mark.height, 0.08 * mark.height, mark.fill)
    _boxes(axes, [whole], top + 0.305, 0.05, "#e6e6e6")
    alphas = [(x, wide * c.alpha) for (x, wide), c in zip(spans, line, strict=True) if c.alpha > 0]
    _boxes(axes, alphas, top + 0.305, 0.05, "#1a1a1a")
    _write(axes, -0.006, top + 0.19, str(first), size=7, ha="right")
    _write(axes, whole[1] + 0.006, top + 0.19, str(line[-1].stop), size=7)
    for (x, wide), chunk in zip(spans, line, strict=True):
        look = STATES[chunk.state]
        if letters and wide > 0.008:
            _write(axes, x + wide / 2, top + 0.19, look.letter, color=look.ink, ha="center")
        if letters and wide > 0.035 and chunk.start > first:
            _write(axes, x, top + 0.43, str(chunk.start), size=6)


def _boxes(
    axes: Axes,
    spans: Sequence[tuple[float, float]],
    top: float,
    height: float,
    fill: str,
    edge: str = "none",
) -> None:
    if spans:
        axes.broken_barh(spans, (top, height), facecolors=fill, edgecolors=edge, linewidth=0.4)


def _write(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    *,
    size: int = 7,
    color: str = "#1a1a1a",
    ha: str = "left",
    weight: str = "normal",
) -> None:
    axes.text(
        x, y, text, fontsize=size, color=color, ha=ha, va="center", weight=weight, parse_math=False
    )
