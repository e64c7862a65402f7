"""The run file: what users write, checked before anything starts."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from esper_ray.errors import ConfigError
from esper_ray.lifecycle import MINIMUM_EPOCHS, ExtendedLifecycle, GateSettings

MAX_BYTES = 1 << 20
MAX_SHOWN = 200
Size = Annotated[int, Field(ge=1, le=1_000_000)]  # what no machine holds, no allocator is asked for
Positive = Annotated[int, Field(ge=1, le=1_000_000_000)]
NotNegative = Annotated[int, Field(ge=0, le=1_000_000_000)]
Rate = Annotated[float, Field(gt=0, lt=1e3)]


class Section(BaseModel):
    """A part of the run file; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DataConfig(Section):
    """Data set by name, samples per optimiser step, samples per evaluation."""

    name: str = "stdlib_text"
    args: dict[str, Any] = Field(default_factory=dict)
    batch_size: Size = 128
    evaluation_samples: Annotated[int, Field(ge=1, le=100_000)] = 2048


class ModelConfig(Section):
    """Import string of a function that returns the model's list of stages."""

    factory: str = "esper_ray.models:byte_mlp"
    args: dict[str, Any] = Field(default_factory=dict)


class TrainConfig(Section):
    """Length of the run and the host's optimiser; an epoch is `seeds.epoch_steps` steps."""

    epochs: Positive = 100
    lr: Rate = 2e-3
    micro_batches: Size = 2


class GraftingConfig(Section):
    """How alpha rises; drift is the relative weight change of a seed per optimiser step."""

    strategy: str = "drift_controlled"
    ramp_epochs: Positive = 50
    drift_threshold: Rate = 0.01
    pause_epochs: Annotated[int, Field(ge=0, le=2**15 - 1)] = 10  # the state tensor's int16


class SeedsConfig(Section):
    """Which modules carry seeds, and what a seed grows."""

    targets: Annotated[list[str], Field(min_length=1)] = Field(default_factory=lambda: ["*"])
    seeds_per_layer: Size = 4
    epoch_steps: Positive = 8
    blueprint: str = "bottleneck"
    hidden: Size = 32
    objective: str = "gradient_target"
    gradient_step: Rate = 0.3
    lr: Annotated[float, Field(ge=0, lt=1e3)] = 2e-3
    warmup_steps: NotNegative = 10
    grafting: GraftingConfig = Field(default_factory=GraftingConfig)


class LifecycleConfig(Section):
    """When seeds are planted and judged, in lifecycle epochs; thresholds of the gates."""

    sync: Literal[True] = True
    germinate_after: NotNegative = 100
    max_growing: Positive = 1_000
    minimum_epochs: dict[str, NotNegative] = Field(default_factory=dict)
    training_timeout: Positive = 300
    fine_tuning_timeout: Positive = 150
    gates: dict[str, float] = Field(default_factory=dict)

    @field_validator("minimum_epochs")
    @classmethod
    def _known_states(cls, value: dict[str, int]) -> dict[str, int]:
        return _known(value, [state.name for state in MINIMUM_EPOCHS])

    @field_validator("gates")
    @classmethod
    def _known_gates(cls, value: dict[str, float]) -> dict[str, float]:
        return _known(value, list(GateSettings.__dataclass_fields__))

    def minima(self) -> dict[ExtendedLifecycle, int]:
        """Minimum epochs of every state, the defaults overlaid with the configured ones."""
        return {s: self.minimum_epochs.get(s.name, n) for s, n in MINIMUM_EPOCHS.items()}


class StorageConfig(Section):
    """The run's own prefix, any fsspec URL, and how often the run is committed."""

    url: str = ""
    options: dict[str, Any] = Field(default_factory=dict)
    every_epochs: Positive = 10


class ClusterConfig(Section):
    """Where the actors run: `local` starts a cluster and ends it with the run."""

    address: str = "local"
    transport: Literal["auto", "object_store"] = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    wait_for_resources_s: Rate = 120.0
    step_timeout_s: Rate = 120.0


class RunConfig(Section):
    """One run."""

    run: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    seeds: SeedsConfig = Field(default_factory=SeedsConfig)
    lifecycle: LifecycleConfig = Field(default_factory=LifecycleConfig)
    storage: StorageConfig = Field(default_factory=StorageConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)

    @field_validator("run")
    @classmethod
    def _run_name(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z0-9-]{1,64}", value):
            raise ValueError("must be 1 to 64 of a-z, 0-9 and -")
        return value

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> RunConfig:
        if self.data.batch_size % self.train.micro_batches:
            raise ValueError(
                f"data.batch_size {self.data.batch_size} is not a multiple of "
                f"train.micro_batches {self.train.micro_batches}"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """What must not change when a run is resumed, as plain values by dotted name."""
        kept = self.model_dump(mode="json", exclude={"storage", "cluster"})
        kept["train"].pop("epochs")
        return dict(_flatten(kept))

    @property
    def storage_url(self) -> str:
        """`storage.url`, by default a folder of the run's name below ./runs."""
        return self.storage.url or f"runs/{self.run}/checkpoints"


def _known(value: dict[str, Any], names: list[str]) -> dict[str, Any]:
    for key in value:
        if key not in names:
            raise ValueError(f"unknown name {_cut(repr(key))}{_nearest(key, names)}")
    return value


def _nearest(key: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(key[:MAX_SHOWN], list(names), n=1, cutoff=0.0)
    return f"; the nearest is {near[0]!r}" if near else ""


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flatten(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


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
        raise ConfigError(f"not valid YAML: {_cut(' '.join(str(error).split()))}") from error


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
    for override in overrides:
        _override(values, override)
    return parse_config(values)


def parse_config(values: Mapping[str, Any]) -> RunConfig:
    """A checked run file from plain values; ConfigError names the first bad key."""
    _check_plain(values)
    try:
        return RunConfig.model_validate(dict(values))
    except ValidationError as error:
        raise _explain(error) from error


def _override(values: dict[str, Any], override: str) -> None:
    name, sign, text = override.partition("=")
    if not sign or not name:
        raise ConfigError(f"--set {_cut(repr(override))} is not of the form section.key=value")
    *sections, key = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {_cut(name)}: {_cut(repr(section))} holds no keys")
    values[key] = parse_yaml(text)


def _check_plain(value: object, name: str = "", levels: int = 32) -> None:
    """Refuse what no checkpoint's manifest could hold, in free-form arguments too."""
    inside = dict(enumerate(value)) if isinstance(value, list) else value
    if isinstance(inside, Mapping) and levels:
        for key, item in inside.items():
            _check_plain(item, f"{name}.{key}".lstrip("."), levels - 1)
    elif not _storable(value):
        kind = f"a {type(value).__name__} that is neither printable text nor a finite 64-bit number"
        raise ConfigError(f"{_cut(name)}: {kind}")


def _storable(value: object) -> bool:
    if isinstance(value, int | float):
        return -(2**63) <= value < 2**63
    return value is None or (isinstance(value, str) and value.isprintable())


def _explain(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    name = _cut(".".join(path))
    if first["type"] == "extra_forbidden":
        near = _nearest(path[-1], _fields_at(path[:-1]))
        return ConfigError(f"unknown key {name!r}{near}", "see the README for every key")
    if first["type"] == "missing":
        return ConfigError(f"the key {name!r} is missing", "every run file needs it")
    reason = first["msg"].removeprefix("Value error, ")
    if not name:
        return ConfigError(reason, "change one of them")
    return ConfigError(f"{name}: {reason}", f"got {_cut(repr(first['input']))}")


def _fields_at(path: list[str]) -> list[str]:
    section: Any = RunConfig
    for part in path:
        section = section.model_fields[part].annotation
    return list(section.model_fields)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
