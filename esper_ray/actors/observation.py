"""What a coordinator knows at one epoch boundary, and what it tells others of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from esper_ray.actors.progress import Progress
from esper_ray.events.messages import MetricsBatch, TelemetryBatch, TransitionBatch
from esper_ray.growth import judging
from esper_ray.lifecycle import ExtendedLifecycle
from esper_ray.policy import LayerReport

_S = ExtendedLifecycle


@dataclass(frozen=True, slots=True)
class Observation:
    """Every layer's report after `step` steps; `accuracy` is that of the gate split."""

    epoch: int
    step: int
    layers: Mapping[str, LayerReport]
    accuracy: float

    @property
    def telemetry(self) -> dict[str, TelemetryBatch]:
        """What each layer saw."""
        return {layer_id: report.telemetry for layer_id, report in self.layers.items()}

    def metrics(self, progress: Progress) -> list[MetricsBatch]:
        """What layers record: of seeds that were judged, and for strategies that need variances."""
        variances = (
            judging.variance(progress.gate_losses),
            judging.variance(progress.gate_accuracies),
        )
        return [
            judging.metrics_batch(
                report.telemetry, report.measured, self.accuracy, report.stability, variances
            )
            for report in self.layers.values()
            if report.measured or (report.telemetry.state == _S.GRAFTING).any()
        ]


def moves_of(batch: TransitionBatch) -> list[tuple[str, int, str, str]]:
    """(layer id, seed id, from, to) of each row."""
    columns = (batch.seed_ids, batch.expected_state, batch.target)
    return [
        (batch.layer_id, seed, _S(source).name, _S(target).name)
        for seed, source, target in zip(*(c.tolist() for c in columns), strict=True)
    ]
