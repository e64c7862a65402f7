"""Layers to draw, from a few numbers, and what a page holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from esper_ray.lifecycle import ExtendedLifecycle
from esper_ray.picture import Layer, Picture, chunk_rows
from esper_ray.seeds.chunks import chunk_bounds

LIMIT = 5
STATES = list(ExtendedLifecycle)


def columns(seeds: int, **given: Sequence[Any] | NDArray[Any]) -> dict[str, NDArray[Any]]:
    """The columns that a picture reads, as at birth where nothing is given."""
    found: dict[str, NDArray[Any]] = {
        "lifecycle_state": np.zeros(seeds, np.int32),
        "alpha": np.zeros(seeds, np.float32),
        "error_count": np.zeros(seeds, np.int32),
        "evaluation_score": np.zeros(seeds, np.int32),
        "performance_metrics": np.zeros((seeds, 4), np.float32),
        "metrics_valid": np.zeros(seeds, np.uint8),
    }
    return {n: np.asarray(given.get(n, v), dtype=v.dtype) for n, v in found.items()}


def layer(
    seeds: int,
    width: int,
    name: str = "reader.hidden",
    sizes: Sequence[int] | None = None,
    **given: Sequence[Any] | NDArray[Any],
) -> Layer:
    """A layer of so many seeds and features."""
    bounds = chunk_bounds(width, seeds, sizes)
    return Layer(name, width, chunk_rows(columns(seeds, **given), bounds, LIMIT))


def motley(seeds: int, width: int, name: str = "reader.hidden") -> Layer:
    """A layer in which no seed is like its neighbour."""
    rng = np.random.default_rng(seeds)
    return layer(
        seeds,
        width,
        name,
        lifecycle_state=np.arange(seeds) % len(STATES),
        alpha=rng.random(seeds),
        error_count=np.arange(seeds) % 8,
        evaluation_score=rng.integers(-50, 50, seeds),
        performance_metrics=rng.random((seeds, 4)),
        metrics_valid=np.arange(seeds) % 16,
    )


def picture(*layers: Layer) -> Picture:
    """A picture of some layers."""
    return Picture("run tiny, step 10, epoch 5", "file:///store@step=10", layers)


class Reader(HTMLParser):
    """Tags, attributes and texts of a page; an element that is not closed in order is an error."""

    VOID = frozenset({"meta"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.append((self.open[-1], data))

    def of(self, tag: str) -> list[str]:
        """Texts of the elements of that name."""
        return [text for name, text in self.texts if name == tag]


def drawings(text: str) -> list[ElementTree.Element]:
    """The drawings of a page, without those of its key."""
    found = re.findall(r"<svg [^>]*role=.*?</svg>", text, re.DOTALL)
    return [ElementTree.fromstring(svg) for svg in found]
