"""Fused kernels of what a layer's seeds compute; plain torch in `blueprints` says what is right."""

from esper_ray.kernels.choice import KERNELS, choose, choose_step
from esper_ray.kernels.form import Form, Layout

__all__ = ["KERNELS", "Form", "Layout", "choose", "choose_step"]
