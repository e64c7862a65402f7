"""What a stage is built from: plain data that travels to a layer actor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from esper_ray.grafting import GraftingSettings
from esper_ray.growth.shard import WHOLE, Shard
from esper_ray.growth.slot_adam import SlotAdamSettings


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One host module that carries seeds; `path` is its name inside the stage's module."""

    layer_id: str
    path: str
    width: int
    num_seeds: int
    chunk_sizes: tuple[int, ...] | None = None
    inputs: int = 0
    feature_dim: int = -1
    """Dimension of the output that its seeds divide."""


@dataclass(frozen=True, slots=True)
class SeedSpec:
    """How seeds grow; `k` is the step size of `gradient_target`.

    Weight drift is the change over an epoch, divided by its steps where `drift_unit` is "step".
    """

    blueprint: str = "bottleneck"
    hidden: int = 32
    objective: str = "gradient_target"
    k: float = 0.3
    optimizer: SlotAdamSettings = field(default_factory=SlotAdamSettings)
    grafting: GraftingSettings = field(default_factory=GraftingSettings)
    drift_unit: Literal["step", "epoch"] = "step"


@dataclass(frozen=True, slots=True)
class DataSpec:
    """Data set, samples per optimiser step, micro-batches that they are cut into."""

    name: str
    args: Mapping[str, object]
    batch_size: int
    micro_batches: int
    evaluation_samples: int
    sha256: str


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One pipeline stage: `factory` is the import string of the model's list of stages."""

    index: int
    count: int
    name: str
    factory: str
    factory_args: Mapping[str, object]
    run_seed: int
    host_lr: float
    epoch_steps: int
    threads: int
    layers: tuple[LayerSpec, ...]
    seeds: SeedSpec
    data: DataSpec
    shard: Shard = WHOLE
    """Which of the actors of this stage; all of them hold all that is not split."""
    device: str = "cpu"
    dtype: str = "float32"
    """Of host and seeds; `float32` leaves a host that is built in another as it is."""
    recompute: bool = False
    """Whether activations are computed again for the backward instead of kept."""

    @property
    def reports(self) -> bool:
        """Whether this actor speaks for its stage where all of its shards would say the same."""
        return self.shard.index == 0

    @property
    def first(self) -> bool:
        """Whether this stage reads the inputs."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether this stage computes the loss."""
        return self.index == self.count - 1
