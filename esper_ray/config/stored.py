"""A run file from what a checkpoint says of its run: data that nobody vouches for."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from esper_ray.config.reading import override, parse_config
from esper_ray.config.schema import RunConfig, cut
from esper_ray.errors import ConfigError, CorruptError

_FACTORY = "model.factory"
_OURS = re.compile(r"esper_ray\.models:[a-z][a-z0-9_]*")


def stored_config(
    settings: Mapping[str, object],
    url: str,
    overrides: Iterable[str] = (),
    allowed: Collection[str] = (),
) -> RunConfig:
    """The run file of a run that is stored at `url`, from the settings that it must keep.

    No module is imported. ConfigError for a factory that is neither a model of esper_ray nor
    `allowed`, for a run of unknown length, and for settings that are no run's.
    """
    factory = settings.get(_FACTORY)
    if not isinstance(factory, str):
        raise CorruptError(f"the checkpoint at {url} does not say what its model is made by")
    if not _OURS.fullmatch(factory) and factory not in allowed:
        raise ConfigError(
            f"the checkpoint at {url} wants {cut(repr(factory))} to be imported and called",
            f"if it is yours: --allow-factory {cut(factory)}; or train its own run file",
        )
    values: dict[str, Any] = {}
    for name, value in settings.items():
        *sections, key = name.split(".")
        inside = values
        for section in sections:
            inside = inside.setdefault(section, {})
            if not isinstance(inside, dict):
                raise CorruptError(f"the checkpoint at {url} has the setting {cut(name)} twice")
        inside[key] = value
    given = tuple(overrides)
    if not any(text.startswith("train.epochs=") for text in given):
        raise ConfigError(
            f"the checkpoint at {url} does not say how long to train", "add --set train.epochs=N"
        )
    values["storage"] = {"url": url}
    for text in given:
        override(values, text)
    config = parse_config(values)
    if config.model.factory != factory and config.model.factory not in allowed:
        raise ConfigError(f"{_FACTORY} of a stored run cannot be set", "train its own run file")
    return config
