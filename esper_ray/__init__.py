"""esper_ray grows a PyTorch model while it trains, on Ray actors."""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

_LAZY = {
    "EsperError": "esper_ray.errors",
    "ExtendedLifecycle": "esper_ray.lifecycle",
    "GraftingStrategyBase": "esper_ray.grafting",
    "Blueprint": "esper_ray.blueprints",
    "Runtime": "esper_ray.runtime",
    "load_config": "esper_ray.config",
}

__all__ = [*sorted(_LAZY), "__version__"]


def __getattr__(name: str) -> object:
    """Import a public name on first use: `import esper_ray` loads neither torch nor Ray."""
    if name not in _LAZY:
        raise AttributeError(f"module 'esper_ray' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
