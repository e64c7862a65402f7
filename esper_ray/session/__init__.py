"""Seeds on the modules of any PyTorch model, trained by a loop of your own, without Ray."""

from esper_ray.layers import Output
from esper_ray.session.checkpoint import restore
from esper_ray.session.config import SeedConfig
from esper_ray.session.exporting import Exported, NotFolded, export
from esper_ray.session.placing import detach, plan
from esper_ray.session.session import SeedSession, attach
from esper_ray.session.tables import LayerStates, PlannedLayer, SeedEvent, SeedPlan, States

__all__ = [
    "Exported",
    "LayerStates",
    "NotFolded",
    "Output",
    "PlannedLayer",
    "SeedConfig",
    "SeedEvent",
    "SeedPlan",
    "SeedSession",
    "States",
    "attach",
    "detach",
    "export",
    "plan",
    "restore",
]
