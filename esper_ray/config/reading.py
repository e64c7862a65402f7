"""From a run file to a checked RunConfig, or one sentence about what is wrong with it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from esper_ray.config.schema import RunConfig, cut, nearest
from esper_ray.errors import ConfigError

MAX_BYTES = 1 << 20


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases and tags, with every key once."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) or getattr(event, "tag", None):  # an alias has an anchor
            raise yaml.YAMLError("aliases, anchors and tags are refused, write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"the key {key!r} is not text, quote it")
            if key in seen:
                raise yaml.YAMLError(f"the key {key!r} stands twice")
            seen.add(key)
        return dict(super().construct_mapping(node, deep))


_PlainLoader.add_implicit_resolver(  # YAML 1.1 reads 2e-3, without a dot, as text
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str | bytes) -> Any:
    """Plain values of a YAML text; ConfigError where it is not YAML."""
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2025-13-45
        raise ConfigError(f"not valid YAML: {cut(' '.join(str(error).split()))}") from error


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> RunConfig:
    """Read and check a run file; `overrides` are `section.key=value` with values in YAML."""
    file = Path(path)
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)  # a device has no size
    except OSError as error:
        raise ConfigError(f"cannot read the run file {file}: {error}") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{file} is larger than {MAX_BYTES} bytes", "shorten it")
    values = parse_yaml(data)
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds no keys", "start from examples/stdlib_lm.yaml")
    for text in overrides:
        override(values, text)
    return parse_config(values)


def parse_config(values: Mapping[str, Any]) -> RunConfig:
    """A checked run file from plain values; ConfigError names the first bad key."""
    _check_plain(values)
    try:
        return RunConfig.model_validate(dict(values))
    except ValidationError as error:
        raise explained(error, RunConfig, "docs/configuration.md") from error


def override(values: dict[str, Any], text: str) -> None:
    """Set one key of a run file by `section.key=value`; ConfigError for another form."""
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise ConfigError(f"--set {cut(repr(text))} is not of the form section.key=value")
    *sections, key = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {cut(name)}: {cut(repr(section))} holds no keys")
    values[key] = parse_yaml(value)


def _check_plain(value: object, name: str = "", levels: int = 32) -> None:
    """Refuse what no checkpoint's manifest could hold, in free-form arguments too."""
    inside = dict(enumerate(value)) if isinstance(value, list) else value
    if isinstance(inside, Mapping) and levels:
        for key, item in inside.items():
            _check_plain(item, f"{name}.{key}".lstrip("."), levels - 1)
    elif not _storable(value):
        kind = f"a {type(value).__name__} that is neither printable text nor a finite 64-bit number"
        raise ConfigError(f"{cut(name)}: {kind}")


def _storable(value: object) -> bool:
    if isinstance(value, int | float):
        return -(2**63) <= value < 2**63
    return value is None or (isinstance(value, str) and value.isprintable())


def explained(error: ValidationError, section: type[BaseModel], page: str) -> ConfigError:
    """One sentence about the first value of `section` that is wrong; `page` lists its keys."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    name = cut(".".join(path))
    if first["type"] == "extra_forbidden":
        near = nearest(path[-1], _fields_at(section, path[:-1]))
        return ConfigError(f"unknown key {name!r}{near}", f"see {page} for every key")
    if first["type"] == "missing":
        return ConfigError(f"the key {name!r} is missing", f"see {page}")
    reason = first["msg"].removeprefix("Value error, ")
    if not name:
        return ConfigError(reason, "change one of them")
    return ConfigError(f"{name}: {reason}", f"got {cut(repr(first['input']))}")


def _fields_at(section: Any, path: list[str]) -> list[str]:
    for part in path:
        section = section.model_fields[part].annotation
    return list(section.model_fields)
