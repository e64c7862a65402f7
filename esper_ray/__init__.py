"""esper_ray grows a PyTorch model while it trains, in your own loop or on Ray actors."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what `__getattr__` finds, for those who check types
    from esper_ray.blueprints import Blueprint as Blueprint
    from esper_ray.config import load_config as load_config
    from esper_ray.errors import EsperError as EsperError
    from esper_ray.grafting import GraftingStrategyBase as GraftingStrategyBase
    from esper_ray.lifecycle import ExtendedLifecycle as ExtendedLifecycle
    from esper_ray.runtime import Runtime as Runtime
    from esper_ray.session import Output as Output
    from esper_ray.session import SeedConfig as SeedConfig
    from esper_ray.session import SeedSession as SeedSession
    from esper_ray.session import attach as attach
    from esper_ray.session import detach as detach
    from esper_ray.session import export as export
    from esper_ray.session import plan as plan
    from esper_ray.session import restore as restore

__version__ = "0.1.0"

_LAZY = {
    "EsperError": "esper_ray.errors",
    "ExtendedLifecycle": "esper_ray.lifecycle",
    "GraftingStrategyBase": "esper_ray.grafting",
    "Blueprint": "esper_ray.blueprints",
    "Runtime": "esper_ray.runtime",
    "Output": "esper_ray.session",
    "SeedConfig": "esper_ray.session",
    "SeedSession": "esper_ray.session",
    "attach": "esper_ray.session",
    "detach": "esper_ray.session",
    "export": "esper_ray.session",
    "plan": "esper_ray.session",
    "restore": "esper_ray.session",
    "load_config": "esper_ray.config",
}

__all__ = [*sorted(_LAZY), "__version__"]


def __getattr__(name: str) -> object:
    """Import a public name on first use: `import esper_ray` loads neither torch nor Ray."""
    if name not in _LAZY:
        raise AttributeError(f"module 'esper_ray' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
