"""The run file: its keys, and how it is read and checked before anything starts."""

from esper_ray.config.reading import load_config, parse_config, parse_yaml
from esper_ray.config.schema import LifecycleConfig, RunConfig

__all__ = ["LifecycleConfig", "RunConfig", "load_config", "parse_config", "parse_yaml"]
