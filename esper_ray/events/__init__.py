"""What parts of a run tell each other, as frozen structs of arrays."""

from esper_ray.events.messages import (
    Answer,
    EpochReport,
    Evaluation,
    EvaluationRequest,
    GraftingSignals,
    MetricsBatch,
    StageReport,
    TelemetryBatch,
    TransitionBatch,
    TransitionReceipt,
)

__all__ = [
    "Answer",
    "EpochReport",
    "Evaluation",
    "EvaluationRequest",
    "GraftingSignals",
    "MetricsBatch",
    "StageReport",
    "TelemetryBatch",
    "TransitionBatch",
    "TransitionReceipt",
]
