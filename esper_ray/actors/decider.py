"""What is decided at an epoch boundary, wherever the layers live and whatever is stored of it."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from typing import cast

import numpy as np

from esper_ray.actors.commands import Commands
from esper_ray.actors.observation import Observation
from esper_ray.actors.progress import Progress, occupied
from esper_ray.errors import RunFailed
from esper_ray.events.messages import (
    Evaluation,
    EvaluationRequest,
    TelemetryBatch,
    TransitionBatch,
)
from esper_ray.grafting import GraftingSettings, StrategySelector
from esper_ray.growth import judging
from esper_ray.lifecycle import Decisions, ExtendedLifecycle, LifecycleManager
from esper_ray.policy import (
    LayerReport,
    Measurement,
    PolicySettings,
    decide,
    judged_rows,
    retiring,
    transition_batch,
)

_GERMINATED = ExtendedLifecycle.GERMINATED

Measured = dict[judging.Seed, Measurement]
Measuring = Generator[EvaluationRequest, Evaluation, tuple[Measured, Evaluation]]
"""Yields what is to be evaluated, is sent the result, and returns what all of it says."""


async def evaluated(
    asking: Measuring, evaluate: Callable[[EvaluationRequest], Awaitable[Evaluation]]
) -> tuple[Measured, Evaluation]:
    """What `asking` returns, once all that it asks for is evaluated."""
    request = next(asking)
    while True:
        try:
            request = asking.send(await evaluate(request))
        except StopIteration as done:
            return cast(tuple[Measured, Evaluation], done.value)


class Decider:
    """Judges what layers report, and says which of their seeds are to move.

    `progress` and `commands` are what it knows from one boundary to the next.
    """

    def __init__(
        self, policy: PolicySettings, manager: LifecycleManager, grafting: GraftingSettings
    ) -> None:
        self._policy, self._manager = policy, manager
        self._selector = StrategySelector(grafting)
        self.progress, self.commands = Progress(), Commands()

    def next_number(self) -> int:
        """A number for one more evaluation."""
        self.progress.number += 1
        return self.progress.number

    def measure(self, telemetry: Mapping[str, TelemetryBatch]) -> Measuring:
        """Counterfactuals of the seeds that are due, and the model as it is.

        RunFailed where the gate loss is not a number and no single seed is to blame.
        """
        minimum = self._manager.minimum_epochs
        due = [
            (layer_id, int(seed_id))
            for layer_id, batch in telemetry.items()
            for seed_id in judged_rows(batch, minimum, self._policy)
        ]
        found, baseline = yield from self._flip(telemetry, due)
        if not math.isfinite(baseline.loss[0]):
            more, _ = yield from self._flip(telemetry, judging.in_the_output(telemetry))
            found |= more
            if not any(measured.guilty for measured in found.values()):
                raise RunFailed(
                    "the gate loss is not a finite number, and no single seed is to blame",
                    "lower the learning rate of host or seeds, or resume an earlier checkpoint by "
                    "URL@step=N",
                )
        return found, baseline

    def _flip(
        self, telemetry: Mapping[str, TelemetryBatch], seeds: Sequence[judging.Seed]
    ) -> Measuring:
        """What each seed gains; and the model as it is."""
        found: Measured = {}
        for group, request in judging.counterfactual_requests(telemetry, seeds, self.next_number()):
            result = yield request
            found.update(judging.measurements(telemetry, group, result))
            self.progress.number = request.number
        return found, result

    def observe(
        self,
        epoch: int,
        step: int,
        telemetry: Mapping[str, TelemetryBatch],
        measured: Mapping[judging.Seed, Measurement],
        gate: tuple[float, float],
    ) -> Observation:
        """What the policy may see; `gate` is loss and accuracy, a loss of NaN was not measured."""
        loss, accuracy = gate
        self.progress.observe(loss, accuracy)
        steady = judging.stability(self.progress.gate_losses)
        layers = {
            layer_id: LayerReport(
                batch,
                steady,
                {seed: found for (owner, seed), found in measured.items() if owner == layer_id},
            )
            for layer_id, batch in telemetry.items()
        }
        return Observation(epoch, step, layers, accuracy)

    def decide(self, now: Observation) -> dict[str, Decisions]:
        """Judge every layer's requests, then what fits the budgets."""
        commands = self.commands.take(now.telemetry)
        judged = [
            decide(report, self._policy, self._manager, commands[layer_id])
            for layer_id, report in now.layers.items()
        ]
        counts = {layer_id: occupied(seen) for layer_id, seen in now.telemetry.items()}
        return {d.requests.layer_id: d for d in self._manager.admit(judged, counts)}

    def retire(self, now: Observation, seeds: Sequence[judging.Seed]) -> dict[str, Decisions]:
        """Judge the retirement of seeds that have made a step fail, by layer."""
        decided = {}
        for name, report in now.layers.items():
            ids = [seed for layer, seed in seeds if layer == name]
            asked = retiring(report.telemetry, np.array(ids, dtype=np.int64), self._policy)
            decided[name] = self._manager.judge(asked)
        return decided

    def settle(self, decisions: Mapping[str, Decisions]) -> dict[str, Decisions]:
        """Answer what was refused; the rows that were accepted, of layers that have some."""
        for name, decided in decisions.items():
            self.commands.settle(name, decided.requests.seed_ids, decided.reason)
        accepted = {name: d.take(np.flatnonzero(d.accepted)) for name, d in decisions.items()}
        return {name: d for name, d in accepted.items() if len(d.requests)}

    def batch(
        self, now: Observation, accepted: Decisions, number: int, checkpoint_id: int = -1
    ) -> TransitionBatch:
        """The transitions of one layer, with a strategy for each seed that germinates."""
        asked = accepted.requests
        born = asked.target == _GERMINATED
        strategy = np.full(len(asked), -1, dtype=np.int32)
        strategy[born] = self._selector.assign(
            asked.layer_id, asked.seed_ids[born], self.progress.outcomes
        )
        return transition_batch(accepted, self._policy, number, now.epoch, checkpoint_id, strategy)

    def book(
        self,
        now: Observation,
        batch: TransitionBatch,
        applied: np.ndarray[tuple[int], np.dtype[np.bool_]],
        reason: np.ndarray[tuple[int], np.dtype[np.uint8]],
    ) -> TransitionBatch:
        """Count what a layer says it has applied, and answer what it refused; the applied rows."""
        name, done = batch.layer_id, batch.take(applied)
        self.commands.settle(name, batch.seed_ids, reason)
        self.progress.count(done, now.telemetry[name], now.layers[name].measured)
        return done
