"""Host layers that carry seeds."""

from esper_ray.layers.chunked import ChunkedKasminaLayer
from esper_ray.layers.hook import Output, SeedHook, attach_seeds, detach_seeds, host_input
from esper_ray.layers.layer_seeds import LayerSeeds

__all__ = [
    "ChunkedKasminaLayer",
    "LayerSeeds",
    "Output",
    "SeedHook",
    "attach_seeds",
    "detach_seeds",
    "host_input",
]
