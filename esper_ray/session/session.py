"""Seeds of a model beside the user's own training loop."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper_ray.actors.progress import Progress, occupied
from esper_ray.errors import ConfigError
from esper_ray.events.messages import (
    Evaluation,
    EvaluationRequest,
    TelemetryBatch,
    TransitionBatch,
)
from esper_ray.grafting import StrategySelector
from esper_ray.growth import judging
from esper_ray.growth.evaluation import summarise
from esper_ray.growth.seed_trainer import SeedTrainer
from esper_ray.layers import LayerSeeds
from esper_ray.lifecycle import Cause, Decisions, ExtendedLifecycle, Refusal
from esper_ray.policy import (
    LayerReport,
    Measurement,
    PolicySettings,
    decide,
    judged_rows,
    transition_batch,
)
from esper_ray.session.config import SeedConfig

_S = ExtendedLifecycle
Evaluate = Callable[[nn.Module], Tensor]


class Move(NamedTuple):
    """One transition of one seed."""

    step: int
    epoch: int
    layer: str
    seed: int
    source: ExtendedLifecycle
    target: ExtendedLifecycle
    cause: Cause


class SeedSession:
    """Trains, judges and blends the seeds of a model; see `attach`.

    The lifecycle moves only in `step` and `request`. `events` are all moves so far.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[LayerSeeds],
        config: SeedConfig,
        optimizer: Optimizer | None,
        evaluate: Evaluate | None,
    ) -> None:
        self.model, self.config = model, config
        self.layers = {layer.layer_id: layer for layer in layers}
        self.events: list[Move] = []
        self.step_count = self.epoch = 0
        self._optimizer, self._evaluate = optimizer, evaluate
        self._trainers: dict[str, SeedTrainer] = {}
        for name, layer in self.layers.items():
            layer.manager = config.manager
            layer.subscribe(self._note)
            spec = config.spec(layer.bank.kind.name)
            self._trainers[name] = SeedTrainer(layer, spec, config.epoch_steps)
        self._progress = Progress()
        self._selector = StrategySelector(config.grafting)
        self._refuse_seeds_in_optimizer()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The seeds' weights, which the session itself steps."""
        for layer in self.layers.values():
            yield from layer.bank.parameters()

    def states(self) -> dict[str, dict[str, int]]:
        """Seeds of each layer by state; states without a seed are left out."""
        return {
            name: dict(Counter(_S(code).name for code in layer.state.view().state.tolist()))
            for name, layer in self.layers.items()
        }

    def request(
        self, action: str, seed_ids: Sequence[int], layer: str | None = None
    ) -> list[Refusal]:
        """Germinate, cancel, cull, roll back or replant some seeds now; Refusal.NONE where done.

        `layer` may be left out where there is one. ConfigError for an unknown layer or action.
        """
        names = list(self.layers)
        if layer is None and len(names) == 1:
            layer = names[0]
        if layer not in self.layers:
            raise ConfigError(f"no layer is named {layer!r}", f"choose one of: {', '.join(names)}")
        answers = self.layers[layer].request(action, seed_ids)
        self._trainers[layer].refresh()
        return answers

    def step(self) -> list[Move]:
        """Call after the optimiser's step: the seeds take theirs. The moves made, if any.

        Every `epoch_steps` calls a lifecycle epoch ends: seeds are judged and moved. RuntimeError
        in eval mode.
        """
        if not self.model.training:
            raise RuntimeError("the model is in eval mode: call model.train() before session.step")
        self._refuse_seeds_in_optimizer()
        for trainer in self._trainers.values():
            trainer.train_seeds()
            trainer.step()
            trainer.begin_step()
        self.step_count += 1
        if self.step_count % self.config.epoch_steps:
            return []
        known = len(self.events)
        self._end_epoch()
        return self.events[known:]

    # ---- an epoch's end ------------------------------------------------------------------------

    def _end_epoch(self) -> None:
        seen = {name: t.end_epoch(self.epoch) for name, t in self._trainers.items()}
        measured, baseline = self._measure(seen)
        steady = judging.stability(self._progress.gate_losses)
        reports = {
            name: LayerReport(
                batch, steady, {s: m for (owner, s), m in measured.items() if owner == name}
            )
            for name, batch in seen.items()
        }
        judged = [
            decide(report, self._rules(name), self.config.manager)
            for name, report in reports.items()
        ]
        self._record(reports, baseline)
        counts = {name: occupied(batch) for name, batch in seen.items()}
        for decided in self.config.manager.admit(judged, counts):
            self._apply(decided.take(np.flatnonzero(decided.accepted)), reports)
        self.epoch += 1

    def _measure(
        self, seen: Mapping[str, TelemetryBatch]
    ) -> tuple[dict[judging.Seed, Measurement], Evaluation | None]:
        if self._evaluate is None:
            return {}, None
        least = self.config.manager.minimum_epochs
        due = [
            (name, int(seed))
            for name, batch in seen.items()
            for seed in judged_rows(batch, least, self._rules(name))
        ]
        found, baseline = self._flip(seen, due)
        if not math.isfinite(baseline.loss[0]):
            more, _ = self._flip(seen, judging.in_the_output(seen))
            found |= more
        self._progress.observe(float(baseline.loss[0]), math.nan)
        return found, baseline

    def _flip(
        self, seen: Mapping[str, TelemetryBatch], seeds: Sequence[judging.Seed]
    ) -> tuple[dict[judging.Seed, Measurement], Evaluation]:
        found: dict[judging.Seed, Measurement] = {}
        for group, request in judging.counterfactual_requests(seen, seeds, self._progress.number):
            result = self._losses(request)
            found.update(judging.measurements(seen, group, result))
            self._progress.number = request.number + 1
        return found, result

    def _losses(self, request: EvaluationRequest) -> Evaluation:
        rows = [self._under(request, setting) for setting in range(request.settings)]
        losses = torch.stack(rows)
        return summarise(losses, torch.full_like(losses, math.nan))

    @torch.no_grad()
    def _under(self, request: EvaluationRequest, setting: int) -> Tensor:
        """Losses (samples,) of the gate split under one row of alphas; changes nothing."""
        assert self._evaluate is not None
        self.model.eval()
        try:
            with ExitStack() as stack:
                for name, alphas in request.alphas.items():
                    layer = self.layers[name]
                    alpha = torch.from_numpy(alphas[setting : setting + 1])
                    stack.enter_context(layer.under(alpha.to(layer.state.alpha.device)))
                losses: object = self._evaluate(self.model)
        finally:
            self.model.train()
        if not isinstance(losses, Tensor) or losses.ndim != 1 or len(losses) < 2:
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise TypeError(
                f"evaluate must return the loss of each sample, (samples,), got {shape}: "
                'give your loss reduction="none"'
            )
        return losses.detach()

    def _record(self, reports: Mapping[str, LayerReport], baseline: Evaluation | None) -> None:
        if baseline is None:
            return
        variances = (judging.variance(self._progress.gate_losses), math.nan)
        for name, report in reports.items():
            if report.measured or (report.telemetry.state == _S.GRAFTING).any():
                batch = judging.metrics_batch(
                    report.telemetry, report.measured, None, report.stability, variances
                )
                self.layers[name].state.record(batch)

    def _apply(self, accepted: Decisions, reports: Mapping[str, LayerReport]) -> None:
        asked = accepted.requests
        if not len(asked):
            return
        name, rules = asked.layer_id, self._rules(asked.layer_id)
        born = asked.target == _S.GERMINATED
        strategy = np.full(len(asked), rules.strategy_id, dtype=np.int32)
        if self.config.grafting.selection.mode != "fixed":
            strategy[born] = self._selector.assign(
                name, asked.seed_ids[born], self._progress.outcomes
            )
        batch = transition_batch(accepted, rules, self._progress.number, self.epoch, 0, strategy)
        applied, _ = self.layers[name].apply_transitions(batch)
        self._trainers[name].refresh()
        done = batch.take(applied)
        self._progress.count(done, reports[name].telemetry, reports[name].measured)

    def _rules(self, name: str) -> PolicySettings:
        return self.config.rules(self.layers[name].bank.kind.blueprint_id)

    # ---- checks and records --------------------------------------------------------------------

    def _note(self, done: TransitionBatch) -> None:
        columns = (done.seed_ids, done.expected_state, done.target, done.cause)
        self.events += [
            Move(self.step_count, self.epoch, done.layer_id, seed, _S(a), _S(b), Cause(why))
            for seed, a, b, why in zip(*(c.tolist() for c in columns), strict=True)
        ]

    def _refuse_seeds_in_optimizer(self) -> None:
        if self._optimizer is None:
            return
        own = {id(p) for p in self.parameters()}
        if any(id(p) in own for group in self._optimizer.param_groups for p in group["params"]):
            raise ConfigError(
                "the optimizer holds weights of seeds, which the session steps itself",
                "make it of the host's parameters, before seeds are attached",
            )

    def _repr_html_(self) -> str:
        names = [s.name for s in _S]
        head = "".join(f"<th>{name}</th>" for name in names)
        rows = "".join(
            f"<tr><td>{layer}</td>{''.join(f'<td>{counts.get(n, 0)}</td>' for n in names)}</tr>"
            for layer, counts in self.states().items()
        )
        return f"<table><tr><th>layer</th>{head}</tr>{rows}</table>"
