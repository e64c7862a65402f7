"""What a coordinator is built from: plain data that travels to its actor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from esper_ray.actors.herald import HeraldSpec
from esper_ray.grafting import GraftingSettings
from esper_ray.lifecycle import LifecycleManager
from esper_ray.policy import PolicySettings
from esper_ray.storage import Mirror, SigningKey


@dataclass(frozen=True, slots=True)
class CoordinatorSpec:
    """What to coordinate: `manifest` is put into every run commit as it is.

    The module of `factory`, the model's, may register strategies of its own.
    """

    actors: int
    epochs: int
    batch_size: int
    every_epochs: int
    upload_errors_pass: bool
    divergence: float
    timeout_s: float
    policy: PolicySettings
    manager: LifecycleManager
    grafting: GraftingSettings
    factory: str
    manifest: Mapping[str, object]
    signing_key: SigningKey | None = None
    mirror: Mirror = field(default_factory=Mirror)
    herald: HeraldSpec = field(default_factory=HeraldSpec)

    def is_last(self, epoch: int) -> bool:
        """Whether the run ends with an epoch."""
        return epoch + 1 == self.epochs

    def is_due(self, epoch: int) -> bool:
        """Whether an epoch ends with a commit, whatever happens in it."""
        return (epoch + 1) % self.every_epochs == 0 or self.is_last(epoch)
