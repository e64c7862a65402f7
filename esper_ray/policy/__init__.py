"""From telemetry and measurements to transition batches: pure functions."""

from esper_ray.policy.base import Command, LayerReport, Measurement, PolicySettings
from esper_ray.policy.decide import decide, transition_batch
from esper_ray.policy.threshold import PLANS, in_output, judged_rows, propose, retiring

__all__ = [
    "PLANS",
    "Command",
    "LayerReport",
    "Measurement",
    "PolicySettings",
    "decide",
    "in_output",
    "judged_rows",
    "propose",
    "retiring",
    "transition_batch",
]
