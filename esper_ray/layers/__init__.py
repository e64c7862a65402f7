"""Host layers that carry seeds."""

from esper_ray.layers.chunked import ChunkedKasminaLayer

__all__ = ["ChunkedKasminaLayer"]
