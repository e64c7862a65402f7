"""What parts of a run tell each other, as frozen structs of arrays."""

from esper_ray.events.messages import (
    EpochReport,
    Evaluation,
    EvaluationRequest,
    MetricsBatch,
    StageReport,
    TelemetryBatch,
    TransitionBatch,
    TransitionReceipt,
)

__all__ = [
    "EpochReport",
    "Evaluation",
    "EvaluationRequest",
    "MetricsBatch",
    "StageReport",
    "TelemetryBatch",
    "TransitionBatch",
    "TransitionReceipt",
]
