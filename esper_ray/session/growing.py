"""The seeds of one model and what is decided about them, step by step and epoch by epoch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from torch import nn

from esper_ray.actors.decider import Decider, Measured
from esper_ray.actors.observation import Observation
from esper_ray.actors.progress import count_seeds
from esper_ray.config.settings import (
    grafting_settings,
    lifecycle_manager,
    policy_settings,
    seed_spec,
)
from esper_ray.events.messages import TelemetryBatch, TransitionBatch
from esper_ray.growth.seed_trainer import SeedTrainer
from esper_ray.layers import LayerSeeds
from esper_ray.layers.hook import CHILD
from esper_ray.lifecycle import Cause, Decisions, ExtendedLifecycle, Refusal
from esper_ray.session.config import SeedConfig
from esper_ray.session.evaluating import Evaluate, evaluation
from esper_ray.session.placing import place
from esper_ray.session.sites import Site
from esper_ray.session.tables import SeedEvent

EVENTS_KEPT: Final = 10_000


class Growing:
    """Seeds beside a host that somebody else trains: their steps, and their lifecycle.

    The constructor attaches them. `steps` counts what was trained, `epochs` what was decided.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SeedConfig,
        sites: Sequence[Site],
        evaluate: Evaluate | None,
    ) -> None:
        self.model, self.config, self.sites = model, config, tuple(sites)
        specs = {s.layer_id: seed_spec(config.growing(s.blueprint)) for s in sites}
        manager = lifecycle_manager(config.lifecycle)
        policy = policy_settings(config.growing(sites[0].blueprint), config.lifecycle)
        self.decider = Decider(policy, manager, grafting_settings(config))
        self.layers: Mapping[str, LayerSeeds] = place(model, sites, config)
        self._hosts = {name: model.get_submodule(name) for name in self.layers}
        self.trainers = {
            name: SeedTrainer(layer, specs[name], config.epoch_steps)
            for name, layer in self.layers.items()
        }
        for layer in self.layers.values():
            layer.manager = manager
        self.steps = self.epochs = 0
        self.events: deque[SeedEvent] = deque(maxlen=EVENTS_KEPT)
        self.observed = (math.nan, math.nan)
        self._evaluate = evaluate
        self.note_weights()

    def lost(self) -> str | None:
        """The first layer whose host carries these seeds no more."""
        hosts = self._hosts.items()
        return next((n for n, h in hosts if getattr(h, CHILD, None) is not self.layers[n]), None)

    def note_weights(self) -> None:
        """Take the seeds' weights, as they are now, for those that this session left."""
        self._left = self._versions()

    def touched(self) -> str | None:
        """A layer whose seeds' weights something else has written since they were noted."""
        now = self._versions()
        return next((name for name, found in now.items() if found != self._left[name]), None)

    def _versions(self) -> dict[str, list[tuple[int, int]]]:
        return {
            name: [(id(weight), weight._version) for weight in layer.bank.weights.values()]
            for name, layer in self.layers.items()
        }

    def step(self) -> None:
        """Train the seeds in TRAINING, move all that may move; every few steps an epoch ends."""
        for trainer in self.trainers.values():
            trainer.train_seeds()
        for trainer in self.trainers.values():
            trainer.step()
            trainer.begin_step()
        self.steps += 1
        try:
            if self.steps % self.config.epoch_steps == 0:
                self._end_epoch()
        finally:
            self.note_weights()

    def observe(self, loss: float | None, accuracy: float | None) -> None:
        """Take what somebody else measured of the gate in this epoch."""
        before = self.observed
        self.observed = (
            before[0] if loss is None else float(loss),
            before[1] if accuracy is None else float(accuracy),
        )

    def request(self, action: str, seed_ids: Sequence[int], layer_id: str) -> list[Refusal]:
        """What the manager says of a change now; what it accepts waits for the epoch's end."""
        reason = self.layers[layer_id].judge(action, seed_ids).reason
        taken = {(layer, seed) for _, layer, seed in self.decider.commands.waiting}
        told: list[Refusal] = []
        for seed, code in zip(map(int, seed_ids), reason.tolist(), strict=True):
            twice = code == Refusal.NONE and (layer_id, seed) in taken
            told.append(Refusal.DUPLICATE_SEED if twice else Refusal(code))
            if told[-1] is Refusal.NONE:
                taken.add((layer_id, seed))
                self.decider.commands.add(action, layer_id, [seed])
        return told

    # ---- the end of an epoch -------------------------------------------------------------------

    def _end_epoch(self) -> None:
        epoch, self.epochs = self.epochs, self.epochs + 1
        telemetry = {name: t.end_epoch(epoch) for name, t in self.trainers.items()}
        measured, gate = self._measure(telemetry)
        now = self.decider.observe(epoch, self.steps, telemetry, measured, gate)
        decisions = self.decider.decide(now)
        for batch in now.metrics(self.decider.progress):
            self.layers[batch.layer_id].state.record(batch)
        accepted = self.decider.settle(decisions)
        applied = [self._apply(now, decided) for decided in accepted.values()]
        self.decider.progress.seeds = count_seeds(telemetry, applied)
        self.decider.commands.answered()

    def _measure(
        self, telemetry: Mapping[str, TelemetryBatch]
    ) -> tuple[Measured, tuple[float, float]]:
        """What due seeds gain; gate loss and accuracy, NaN where nobody has measured them."""
        (loss, accuracy), self.observed = self.observed, (math.nan, math.nan)
        if self._evaluate is None:
            return {}, (loss, accuracy)
        asking = self.decider.measure(telemetry)
        request = next(asking)
        while True:
            result = evaluation(self.model, self.layers, self._evaluate, request)
            try:
                request = asking.send(result)
            except StopIteration as done:
                measured, baseline = done.value
                return measured, (float(baseline.loss[0]), accuracy)

    def _apply(self, now: Observation, accepted: Decisions) -> TransitionBatch:
        layer = self.layers[accepted.requests.layer_id]
        batch = self.decider.batch(now, accepted, number=0)
        own = np.where(batch.blueprint_id >= 0, layer.bank.kind.blueprint_id, -1)
        batch = replace(batch, blueprint_id=own.astype(np.int32))
        applied, reason = layer.apply_transitions(batch)
        self.trainers[batch.layer_id].refresh()
        done = self.decider.book(now, batch, applied, reason)
        self.events.extend(_told(done, self.steps))
        return done


def _told(batch: TransitionBatch, step: int) -> list[SeedEvent]:
    columns = (
        batch.seed_ids,
        batch.expected_generation,
        batch.expected_state,
        batch.target,
        batch.cause,
    )
    return [
        SeedEvent(
            epoch=batch.epoch,
            step=step,
            layer=batch.layer_id,
            seed_id=seed,
            generation=generation,
            source=ExtendedLifecycle(source).name,
            target=ExtendedLifecycle(target).name,
            cause=Cause(cause).name,
        )
        for seed, generation, source, target, cause in zip(
            *(column.tolist() for column in columns), strict=True
        )
    ]
