"""Chunks, the state of every seed, and the stacked weights of what seeds grow."""

from esper_ray.seeds.bank import SeedBank
from esper_ray.seeds.chunks import ChunkManager
from esper_ray.seeds.state_tensor import ExtendedStateTensor, Refusal, SeedView

__all__ = ["ChunkManager", "ExtendedStateTensor", "Refusal", "SeedBank", "SeedView"]
