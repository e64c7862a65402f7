"""Seeds on a model that an ordinary training loop trains: in this process, without Ray."""

from esper_ray.session.attach import LayerTarget, attach, detach, plan
from esper_ray.session.config import SeedConfig
from esper_ray.session.session import Move, SeedSession

__all__ = ["LayerTarget", "Move", "SeedConfig", "SeedSession", "attach", "detach", "plan"]
