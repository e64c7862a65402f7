"""A picture of the chunks of a run: who owns which features, and how its seed is."""

from esper_ray.picture.files import Renderer, renderer, write
from esper_ray.picture.rows import Chunk, Health, Layer, Picture, chunk_rows, lines, same_runs
from esper_ray.picture.sources import of_checkpoint, of_plan

__all__ = [
    "Chunk",
    "Health",
    "Layer",
    "Picture",
    "Renderer",
    "chunk_rows",
    "lines",
    "of_checkpoint",
    "of_plan",
    "renderer",
    "same_runs",
    "write",
]
