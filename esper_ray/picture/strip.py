"""One line of chunks as SVG: few elements, however many seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final, TypeVar

from esper_ray.picture.rows import Chunk
from esper_ray.picture.style import HEALTHS, STATES
from esper_ray.picture.words import one, several

WIDTH: Final = 1000

_LEFT, _BAND = 60, 880
_HEALTH: Final = 9  # lanes from the top: health, cells, alpha, first features
_CELL_TOP, _CELL = 11, 20
_ALPHA_TOP, _ALPHA = 33, 5
_LABEL = 49
_SHORT, _TALL = 46, 58
_LETTER_ROOM, _LABEL_ROOM = 8.0, 34.0  # a narrower chunk has no letter, no number

K = TypeVar("K")
Box = tuple[float, float, float, float]


class Strip:
    """Chunks side by side; a line of `longest` features takes the whole width."""

    def __init__(self, chunks: Sequence[Chunk], longest: int) -> None:
        self._chunks = chunks
        self._first, self._scale = chunks[0].start, _BAND / longest
        labelled = any(self._wide(chunk) >= _LABEL_ROOM for chunk in chunks[1:])
        self.height = _TALL if labelled else _SHORT

    def ends(self) -> str:
        """First and last feature of the line, and those of chunks that have room for a number."""
        last = self._chunks[-1]
        middle = _CELL_TOP + 14
        labels = "".join(
            f'<text x="{_short(self._x(chunk))}" y="{_LABEL}">{chunk.start}</text>'
            for chunk in self._chunks[1:]
            if self._wide(chunk) >= _LABEL_ROOM
        )
        return (
            f'<text x="{_LEFT - 6}" y="{middle}" text-anchor="end">{self._first}</text>'
            f'<text x="{_short(self._x(last) + self._wide(last) + 6)}" y="{middle}">{last.stop}'
            f"</text>{labels}"
        )

    def bars(self) -> str:
        """Health above the cells, alpha below them."""
        marks: dict[int, list[Box]] = defaultdict(list)
        for chunk in self._chunks:
            height = HEALTHS[chunk.health].height * _HEALTH
            box = (self._x(chunk), _HEALTH - height, self._wide(chunk), height)
            marks[chunk.health].append(box)
        health = "".join(f'<path class="h{h}" d="{_path(b)}"/>' for h, b in sorted(marks.items()))
        alphas = [
            (self._x(chunk), _ALPHA_TOP, self._wide(chunk) * min(chunk.alpha, 1.0), _ALPHA)
            for chunk in self._chunks
            if chunk.alpha > 0
        ]
        track = _path([(_LEFT, _ALPHA_TOP, self._length, _ALPHA)])
        alpha = f'<path class="alpha" d="{_path(alphas)}"/>' if alphas else ""
        return f'{health}<path class="track" d="{track}"/>{alpha}'

    def cells(self, letters: bool) -> str:
        """A box per chunk in its state's colour, with the state's letter where it fits."""
        by_state: dict[int, list[Chunk]] = defaultdict(list)
        for chunk in self._chunks:
            by_state[chunk.state].append(chunk)
        parts = ['<g class="cells">']
        for state, chunks in sorted(by_state.items()):
            boxes = [(self._x(c), _CELL_TOP, self._wide(c), _CELL) for c in chunks]
            parts.append(f'<path class="s{state}" d="{_path(boxes)}"/>')
            roomy = [c for c in chunks if letters and self._wide(c) >= _LETTER_ROOM]
            if roomy:
                places = " ".join(_short(self._x(c) + self._wide(c) / 2) for c in roomy)
                letter = STATES[roomy[0].state].letter
                parts.append(
                    f'<text class="i{state}" x="{places}" y="{_CELL_TOP + 14}">'
                    f"{letter * len(roomy)}</text>"
                )
        frame = _path([(_LEFT, _CELL_TOP, self._length, _CELL)])
        return f'{"".join(parts)}</g><path class="edge" d="{frame}"/>'

    def tips(self, each: bool) -> str:
        """Tooltips: one per chunk, or one for the line."""
        if not each:
            return f'<g class="tips">{self._tip(_LEFT, self._length, several(self._chunks))}</g>'
        found = (self._tip(self._x(c), self._wide(c), one(c)) for c in self._chunks)
        return f'<g class="tips">{"".join(found)}</g>'

    @property
    def _length(self) -> float:
        return (self._chunks[-1].stop - self._first) * self._scale

    def _x(self, chunk: Chunk) -> float:
        return _LEFT + (chunk.start - self._first) * self._scale

    def _wide(self, chunk: Chunk) -> float:
        return (chunk.stop - chunk.start) * self._scale

    def _tip(self, x: float, wide: float, words: str) -> str:
        place = f'x="{_short(x)}" width="{_short(wide)}" height="{_ALPHA_TOP + _ALPHA}"'
        return f"<rect {place}><title>{words}</title></rect>"


def _path(boxes: Iterable[Box]) -> str:
    return "".join(
        f"M{_short(x)} {_short(y)}h{_short(w)}v{_short(h)}h-{_short(w)}z" for x, y, w, h in boxes
    )


def _short(number: float) -> str:
    return f"{number:.2f}".rstrip("0").rstrip(".")
