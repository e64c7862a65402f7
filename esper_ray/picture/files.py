"""Which renderer a file's name asks for, and the file itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from esper_ray.errors import ConfigError
from esper_ray.picture.page import page
from esper_ray.picture.png import png
from esper_ray.picture.rows import Picture

Renderer = Callable[[Picture], bytes]

_RENDERERS: Final[Mapping[str, Renderer]] = {
    ".html": lambda picture: page(picture).encode(),
    ".png": png,
}


def renderer(out: str) -> Renderer:
    """What draws a file of that name; ConfigError unless it ends in .html or .png."""
    found = _RENDERERS.get(Path(out).suffix.lower())
    if found is None:
        raise ConfigError(
            f"{out!r} is no kind of file that can be drawn", "end it in .png or .html"
        )
    return found


def write(out: str, data: bytes) -> None:
    """Write the file, over one that is there; ConfigError where that cannot be done."""
    try:
        Path(out).write_bytes(data)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(
            f"{out!r} cannot be written: {reason}", "name a file in a folder that exists"
        ) from error
