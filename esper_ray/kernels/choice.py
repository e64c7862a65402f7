"""Which implementation a layer uses: decided once, when it is built or moved."""

from __future__ import annotations

import importlib.util
from typing import Final

import torch

from esper_ray.errors import ConfigError
from esper_ray.kernels.form import Form

KERNELS: Final = ("auto", "torch", "cpu", "triton")


def choose(asked: str, form: Form | None, device: torch.device) -> str:
    """`torch`, `cpu` or `triton`; ConfigError where what is asked for cannot be had.

    `torch` runs the blueprint itself. `auto` takes a fused kernel for a blueprint of fused form:
    `triton` on a CUDA device, `cpu` on a CPU.
    """
    if asked not in KERNELS:
        raise ConfigError(f"no kernel is named {asked!r}", f"choose one of: {', '.join(KERNELS)}")
    if asked == "torch" or (asked == "auto" and form is None):
        return "torch"
    if form is None:
        raise ConfigError(
            "this blueprint has no fused kernel", "leave the kernel at auto, or choose torch"
        )
    if asked == "auto":
        fitting = {"cpu": "cpu", "cuda": "triton" if _triton() else "torch"}
        return fitting.get(device.type, "torch")
    if asked == "triton" and not _triton():
        raise ConfigError("triton is not installed", "pip install triton, or choose torch")
    return asked


def choose_step(asked: str, device: torch.device) -> str:
    """`torch` or `triton`: what steps the weights of a layer for which `asked` was asked."""
    if asked == "auto":
        return "triton" if device.type == "cuda" and _triton() else "torch"
    return "triton" if asked == "triton" else "torch"


def _triton() -> bool:
    return importlib.util.find_spec("triton") is not None
