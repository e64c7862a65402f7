"""Every key of a run file: type, default, meaning. docs/configuration.md is made from this."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Field, field_validator, model_validator

from esper_ray.config.cluster import ClusterConfig
from esper_ray.config.events import EventsConfig
from esper_ray.config.section import (
    MOST_INT16,
    Fraction,
    NotNegative,
    Positive,
    Rate,
    Section,
    Size,
)
from esper_ray.config.storage import StorageConfig
from esper_ray.lifecycle import MINIMUM_EPOCHS, ExtendedLifecycle, GateSettings

MAX_SHOWN = 200


class DataConfig(Section):
    """What the model is trained, judged and tested on."""

    name: str = "stdlib_text"
    """Data set: `stdlib_text`, or `digits` with the demo extra."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the data set; `window` and `cap_bytes` for `stdlib_text`."""
    batch_size: Size = 128
    """Samples per optimiser step."""
    evaluation_samples: Annotated[int, Field(ge=1, le=100_000)] = 2048
    """Samples per evaluation of the gate or test split, spread evenly over it."""


class ModelConfig(Section):
    """The host, a list of stages."""

    factory: str = "esper_ray.models:byte_mlp"
    """Import string of a function that returns a list of StageFactory."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of that function."""


class TrainConfig(Section):
    """Length of the run and the host's optimiser, Adam."""

    epochs: Positive = 100
    """Lifecycle epochs; each is `seeds.epoch_steps` optimiser steps."""
    lr: Rate = 2e-3
    """Learning rate of the host."""
    micro_batches: Size = 2
    """Pieces that a batch is cut into on its way through the stages."""
    divergence: Annotated[float, Field(ge=0, lt=1e9)] = 10.0
    """Deviations above the median of the last 32 losses, at a loss above all so far, from which on
    a step [has diverged](governor.md) and is made again; 0: never."""
    precision: Literal["float32", "float64"] = "float32"
    """Of host and seeds; a host that its factory builds in bfloat16 stays so under `float32`."""


class SelectionConfig(Section):
    """Which grafting strategy a seed gets; `strategy` of `seeds.grafting` is the default."""

    mode: Literal["fixed", "performance", "ab", "bandit"] = "fixed"
    """`fixed`: the default; `performance`: it gives way to others by telemetry; `ab`: an arm by
    seed id; `bandit`: the arm that has gained most, by UCB1."""
    arms: list[str] = Field(default_factory=list)
    """Strategies of `ab` and `bandit`."""
    experiment: str = ""
    """Name of an `ab` experiment; another name deals the arms anew."""
    improving_delta: Fraction = 0.01
    """Gain above which a seed improves, for `performance`."""
    improving_epochs: Annotated[int, Field(ge=1, le=255)] = 3
    """Epochs in a row after which an improving seed switches to `momentum`."""
    cooldown_epochs: Annotated[int, Field(ge=1, le=MOST_INT16)] = 10
    """Epochs between two switches of a seed."""


class GraftingConfig(Section):
    """How alpha rises from 0 to 1 in GRAFTING."""

    strategy: str = "drift_controlled"
    """`linear`, `drift_controlled`, `momentum`, `adaptive` or `stability`."""
    ramp_epochs: Annotated[int, Field(ge=1, le=MOST_INT16 // 2)] = 50
    """Lifecycle epochs of the ramp without a pause."""
    drift_threshold: Rate = 0.01
    """Weight drift of a seed above which alpha is held."""
    drift_unit: Literal["step", "epoch"] = "step"
    """Drift is the relative weight change per optimiser step, or per lifecycle epoch."""
    pause_epochs: Annotated[int, Field(ge=0, le=MOST_INT16)] = 10
    """Lifecycle epochs that alpha is held for."""
    resume: Literal["jump", "continue"] = "jump"
    """After a pause alpha jumps to where the ramp would be, or goes on from where it was."""
    momentum_factor: Fraction = 0.1
    """Share of the velocity that `momentum` keeps from one epoch to the next."""
    adaptive_drift: Rate = 0.005
    """Drift above which `adaptive` pauses and lengthens its ramp."""
    adaptive_delta: Fraction = 0.01
    """Gain above which `adaptive` speeds up and shortens its ramp."""
    check_every: Annotated[int, Field(ge=1, le=MOST_INT16)] = 5
    """Epochs between the checks of `stability`."""
    loss_variance_max: Rate = 0.1
    """Variance of the last gate losses below which a seed is stable."""
    gradient_norm_max: Annotated[float, Field(gt=0, lt=1e9)] = 10.0
    """Gradient norm below which it is."""
    accuracy_variance_max: Rate = 0.05
    """Variance of the last gate accuracies below which it is."""
    selection: SelectionConfig = Field(default_factory=SelectionConfig)


AUTO: Final = "auto"


class SeedsConfig(Section):
    """Which modules carry seeds, and what a seed grows."""

    targets: Annotated[list[str], Field(min_length=1)] = Field(default_factory=lambda: ["*"])
    """Patterns of module names, `STAGE.PATH`; each must match, and the last dimension of a matched
    module's output is divided among its seeds."""
    seeds_per_layer: Size = 4
    """Seeds, and so chunks, of each matched module."""
    chunk_sizes: list[Size] | None = None
    """Features of each chunk, in order; by default they are as equal as can be."""
    epoch_steps: Positive = 8
    """Optimiser steps of a lifecycle epoch."""
    blueprint: str = AUTO
    """What a seed grows: `bottleneck`, `low_rank` or `affine` on its chunk, `input_mlp` on the
    layer's whole input, `input_chunk_mlp` on both, `autoencoder` for `reconstruction`, or
    [one of your own](growth.md#a-blueprint-of-your-own). `auto`: `input_mlp` if all modules are
    Linear or MLPs that show their input, else `bottleneck`; `autoencoder` for `reconstruction`."""
    hidden: Size = 32
    """Hidden units of a blueprint."""
    objective: str = "gradient_target"
    """What a seed in TRAINING learns: `gradient_target` or `reconstruction`."""
    gradient_step: Rate = 0.3
    """k of `gradient_target`: length of the step that the seed learns to make."""
    lr: Annotated[float, Field(ge=0, lt=1e3)] = 2e-3
    """Learning rate of the seeds."""
    warmup_steps: NotNegative = 10
    """Optimiser steps over which a newborn seed's learning rate rises."""
    grafting: GraftingConfig = Field(default_factory=GraftingConfig)

    def kind_for(self, *, feeds: bool) -> str:
        """Name of the blueprint; `feeds` where it should read the layer's input."""
        if self.blueprint != AUTO:
            return self.blueprint
        if self.objective == "reconstruction":
            return "autoencoder"
        return "input_mlp" if feeds else "bottleneck"


class BudgetConfig(Section):
    """How many seeds may be in a state at once; without a number, any."""

    training_per_layer: Positive | None = None
    """Seeds of one layer in TRAINING."""
    training_in_all: Positive | None = None
    """Seeds of all layers in TRAINING."""
    grafting_per_layer: Positive | None = None
    """Seeds of one layer in GRAFTING."""
    grafting_in_all: Positive | None = None
    """Seeds of all layers in GRAFTING."""


class LifecycleConfig(Section):
    """When seeds are planted and judged, in lifecycle epochs."""

    sync: Literal[True] = True
    """Decisions fall at epoch boundaries, so a run is reproducible."""
    germinate_after: NotNegative = 100
    """Epoch of the first planting."""
    max_growing: Positive = 1_000
    """Seeds of one layer that may be between GERMINATED and FINE_TUNING at once."""
    minimum_epochs: dict[str, NotNegative] = Field(default_factory=dict)
    """Least epochs in a state, by its name; [defaults](lifecycle.md#states)."""
    training_timeout: Positive = 300
    """Epochs in TRAINING after which a seed that its gate refuses is culled."""
    fine_tuning_timeout: Positive = 150
    """The same for FINE_TUNING."""
    error_limit: NotNegative = 5
    """Errors above which a growing seed is culled or rolled back; in EVALUATING its gate says."""
    gates: dict[str, float] = Field(default_factory=dict)
    """Thresholds of the gates, by name; [defaults](lifecycle.md#gates)."""
    replanting: bool = False
    """Whether a request may start a culled, cancelled or rolled back seed anew."""
    embargo_epochs: NotNegative = 0
    """Epochs after which a culled seed may be replanted."""
    budgets: BudgetConfig = Field(default_factory=BudgetConfig)

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


class RunConfig(Section):
    """One run."""

    run: str
    """Name, 1 to 64 of a-z, 0-9 and -."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Every random number of the run follows from it."""
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    seeds: SeedsConfig = Field(default_factory=SeedsConfig)
    lifecycle: LifecycleConfig = Field(default_factory=LifecycleConfig)
    storage: StorageConfig = Field(default_factory=StorageConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    events: EventsConfig = Field(default_factory=EventsConfig)

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
        kept = self.model_dump(mode="json", exclude={"storage", "cluster", "events"})
        kept["train"].pop("epochs")
        return dict(_flatten(kept))

    @property
    def storage_url(self) -> str:
        """`storage.url`, by default a folder of the run's name below ./runs."""
        return self.storage.url or f"runs/{self.run}/checkpoints"


def _known(value: dict[str, Any], names: list[str]) -> dict[str, Any]:
    for key in value:
        if key not in names:
            raise ValueError(f"unknown name {cut(repr(key))}{nearest(key, names)}")
    return value


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flatten(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def nearest(key: str, names: Iterable[str]) -> str:
    """The name that a mistyped key most resembles, as the end of a sentence."""
    near = difflib.get_close_matches(key[:MAX_SHOWN], list(names), n=1, cutoff=0.0)
    return f"; the nearest is {near[0]!r}" if near else ""


def cut(text: str) -> str:
    """At most MAX_SHOWN characters of something that a user wrote."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
