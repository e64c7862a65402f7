"""Chunks, the state of every seed, and the stacked weights of what seeds grow."""

from esper_ray.seeds.bank import SeedBank
from esper_ray.seeds.chunks import ChunkManager, ChunkRows
from esper_ray.seeds.columns import SeedColumns, SeedView
from esper_ray.seeds.logical_seed import HistoryEntry, LogicalSeed, SeedHost
from esper_ray.seeds.mirror import ExactBuffers, Latch
from esper_ray.seeds.phase1 import Phase1State, StateTensor, migrate
from esper_ray.seeds.state_tensor import Applied, ExtendedStateTensor

__all__ = [
    "Applied",
    "ChunkManager",
    "ChunkRows",
    "ExactBuffers",
    "ExtendedStateTensor",
    "HistoryEntry",
    "Latch",
    "LogicalSeed",
    "Phase1State",
    "SeedBank",
    "SeedColumns",
    "SeedHost",
    "SeedView",
    "StateTensor",
    "migrate",
]
