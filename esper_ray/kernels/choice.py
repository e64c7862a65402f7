"""Which implementation a layer uses: decided once, when it is built or moved."""

from __future__ import annotations

import importlib.util
from typing import Final

import torch

from esper_ray.errors import ConfigError
from esper_ray.kernels.form import Form

KERNELS: Final = ("auto", "torch", "triton")


def choose(asked: str, form: Form | None, device: torch.device) -> str:
    """`torch` or `triton`; ConfigError where `triton` is asked for and cannot be had.

    `auto` takes Triton for a blueprint of fused form on a CUDA device.
    """
    if asked not in KERNELS:
        raise ConfigError(f"no kernel is named {asked!r}", f"choose one of: {', '.join(KERNELS)}")
    if asked == "torch" or (asked == "auto" and (form is None or device.type != "cuda")):
        return "torch"
    installed = importlib.util.find_spec("triton") is not None
    if asked == "auto":
        return "triton" if installed else "torch"
    if form is None:
        raise ConfigError(
            "this blueprint has no fused kernel", "leave the kernel at auto, or choose torch"
        )
    if not installed:
        raise ConfigError("triton is not installed", "pip install triton, or choose torch")
    return "triton"
