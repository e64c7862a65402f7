"""Demo models: plain modules, and lists of pipeline stages for the runtime."""

from esper_ray.models.convnet import SmallConvNet, small_convnet
from esper_ray.models.gpt import ByteGPT, byte_gpt
from esper_ray.models.gpt_size import LARGE, SMALL, GPTSize, same_parameters_mlp_width
from esper_ray.models.mlp import byte_mlp, digits_mlp
from esper_ray.models.stages import StageFactory

__all__ = [
    "LARGE",
    "SMALL",
    "ByteGPT",
    "GPTSize",
    "SmallConvNet",
    "StageFactory",
    "byte_gpt",
    "byte_mlp",
    "digits_mlp",
    "same_parameters_mlp_width",
    "small_convnet",
]
