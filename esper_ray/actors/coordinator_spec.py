"""What a coordinator is built from: plain data that travels to its actor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from esper_ray.grafting import GraftingSettings
from esper_ray.lifecycle import LifecycleManager
from esper_ray.policy import PolicySettings
from esper_ray.storage import Mirror, SigningKey


@dataclass(frozen=True, slots=True)
class CoordinatorSpec:
    """What to coordinate: `manifest` is put into every run commit as it is.

    The module of `factory`, the model's, may register strategies of its own.
    """

    stages: int
    epochs: int
    batch_size: int
    every_epochs: int
    upload_errors_pass: bool
    timeout_s: float
    policy: PolicySettings
    manager: LifecycleManager
    grafting: GraftingSettings
    factory: str
    manifest: Mapping[str, object]
    signing_key: SigningKey | None = None
    mirror: Mirror = field(default_factory=Mirror)
