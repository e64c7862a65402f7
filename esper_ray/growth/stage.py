"""One stage of a model with its seeds and optimisers: everything but where it runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from esper_ray import data
from esper_ray.errors import ConfigError
from esper_ray.events.messages import (
    Evaluation,
    EvaluationRequest,
    MetricsBatch,
    OlderRows,
    StageReport,
    TransitionBatch,
    TransitionReceipt,
)
from esper_ray.growth.assembly import build_stage
from esper_ray.growth.evaluation import StageEvaluator
from esper_ray.growth.seed_trainer import SeedTrainer
from esper_ray.growth.spec import StageSpec
from esper_ray.keyed_random import reseed, stream_key
from esper_ray.layers.columns import Shards

BATCH, OTHER_BATCH = "batch", "other batch"
"""Random streams of a step's batch, and of the one that stands in for a batch that is skipped."""


class Stage:
    """Forward, backward and optimiser step of one stage, one micro-batch at a time.

    A step is `begin_step`, then forward and backward of every micro-batch, each in ascending
    order, then `finish_step`. Nothing in a step waits for the device.
    """

    def __init__(self, spec: StageSpec, shards: Shards | None = None) -> None:
        torch.set_num_threads(spec.threads)
        self.spec = spec
        self._data = data.load(spec.data.name, **spec.data.args)
        if self._data.card.sha256 != spec.data.sha256:
            raise ConfigError(
                f"stage {spec.name!r} reads other {spec.data.name} bytes than the driver",
                "run the same Python and packages on every node",
            )
        self.device = torch.device(spec.device)
        self.module, layers = build_stage(spec, shards)
        self.trainers = {
            layer.layer_id: SeedTrainer(layer, spec.seeds, spec.epoch_steps, shards)
            for layer in layers
        }
        grown = {id(weight) for layer in layers for weight in layer.bank.parameters()}
        self.host_parameters = {
            name: p for name, p in self.module.named_parameters() if id(p) not in grown
        }
        self.optimizer = torch.optim.Adam(self.host_parameters.values(), lr=spec.host_lr)
        self._evaluator = StageEvaluator(spec, self.module, layers)
        self.step = 0
        self.batch_stream = BATCH
        self._stash: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._batch: list[data.Batch] = []
        self.losses: list[Tensor] = []
        self.at_boundary = True
        self.most_in_flight = 0

    most_in_flight: int
    """Micro-batches that were kept at once, at most."""
    at_boundary: bool
    """Whether states may have changed since the last step: shards have to agree again."""

    # ---- training ----------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Start optimiser step `step`, counted from 0 over the whole run."""
        if step != self.step:
            raise RuntimeError(f"stage {self.spec.name!r} is at step {self.step}, not {step}")
        self.module.train()
        self.optimizer.zero_grad(set_to_none=True)
        for trainer in self.trainers.values():
            if self.at_boundary:
                trainer.agree()
            trainer.begin_step()
        self.at_boundary = False
        if self.spec.first or self.spec.last:
            self._draw(step)

    def _draw(self, step: int) -> None:
        source = self.spec.data
        x, y = self._data.train.draw(source.batch_size, self.spec.run_seed, self.batch_stream, step)
        pieces = source.micro_batches
        x, y = self.here(x), self.here(y)
        self._batch = list(zip(x.chunk(pieces), y.chunk(pieces), strict=True))
        if self.spec.last:
            self.losses.append(torch.zeros((), device=self.device))

    def here(self, x: Tensor) -> Tensor:
        """A tensor of the data set on this stage's device, numbers in the run's precision."""
        kind = x.dtype
        if kind == torch.float32:
            kind = getattr(torch, self.spec.dtype)
        return x.to(self.device, kind, non_blocking=True)

    def forward(self, micro_batch: int, received: Tensor | None) -> Tensor:
        """Output of this stage; on the last stage the micro-batch's share of the mean loss."""
        x = self._batch[micro_batch][0] if received is None else _leaf(received)
        again = self.spec.recompute and not self.spec.last  # the last stage goes back at once
        with torch.set_grad_enabled(not again):
            y = self._run(micro_batch, x)
        if self.spec.last:
            targets = self._batch[micro_batch][1]
            y = cross_entropy(y, targets, reduction="sum") / self.spec.data.batch_size
            self.losses[-1] = self.losses[-1] + y.detach()
        self._stash[micro_batch] = (x, y if not again else None)
        self.most_in_flight = max(self.most_in_flight, len(self._stash))
        return y.detach()

    def _run(self, micro_batch: int, x: Tensor) -> Tensor:
        stream = (self.spec.run_seed, "stage", self.spec.index, self.step, micro_batch)
        reseed(stream_key(*stream))
        y: Tensor = self.module(x)
        return y

    def backward(self, micro_batch: int, gradient: Tensor | None) -> Tensor | None:
        """Gradient of the inputs; `gradient` is that of the outputs, None on the last stage."""
        x, y = self._stash.pop(micro_batch)
        if y is None:
            y = self._run(micro_batch, x)
        y.backward(gradient)  # type: ignore[no-untyped-call]
        return x.grad

    def finish_step(self) -> None:
        """Train the seeds in TRAINING, then move host and seeds by one optimiser step."""
        for trainer in self.trainers.values():
            trainer.train_seeds()
        self.optimizer.step()
        for trainer in self.trainers.values():
            trainer.step()
        self.step += 1

    @property
    def in_flight(self) -> int:
        """Micro-batches whose backward is still to come."""
        return len(self._stash)

    # ---- epoch boundary ----------------------------------------------------------------------

    def end_epoch(self, epoch: int) -> StageReport:
        """One lifecycle epoch for every layer; the only place that reads losses to the host."""
        losses, self.losses = self.losses, []
        values = torch.stack(losses).tolist() if losses else []
        telemetry = tuple(trainer.end_epoch(epoch) for trainer in self.trainers.values())
        self.at_boundary = True
        where = self.spec.index, self.spec.shard.index
        return StageReport(*where, epoch, self.step, telemetry, tuple(values))

    def apply(self, batch: TransitionBatch) -> TransitionReceipt:
        """Apply what is still current of one layer's transitions."""
        trainer, self.at_boundary = self.trainers[batch.layer_id], True
        applied, reason = trainer.layer.apply_transitions(batch)
        trainer.follow(batch.take(applied))
        return TransitionReceipt(batch.layer_id, batch.number, self.step, applied, reason)

    def record(self, batch: MetricsBatch) -> None:
        """Store measured metrics of one layer's seeds."""
        self.trainers[batch.layer_id].layer.state.record(batch)

    def give_back(self, older: OlderRows) -> None:
        """Give seeds in ROLLED_BACK older strategies and measurements."""
        self.trainers[older.layer_id].layer.state.give_back(older.seed_ids, older.columns())

    # ---- evaluation --------------------------------------------------------------------------

    def evaluation_batches(self, request: EvaluationRequest) -> int:
        """Number of `evaluate` calls that the request needs."""
        return self._evaluator.batches(self._data.split(request.split))

    def evaluate(
        self, request: EvaluationRequest, number: int, received: Tensor | None
    ) -> Tensor | None:
        """Forward batch `number` under every alpha setting of the request; changes nothing."""
        split = self._data.split(request.split)
        return self._evaluator.forward(request, split, number, received, self.here)

    def evaluation(self) -> Evaluation | None:
        """The result after the last batch; None but on the last stage."""
        return self._evaluator.result()


def _leaf(received: Tensor) -> Tensor:
    """A tensor that ends this stage's graph: autograd does not cross actors."""
    return received.detach().requires_grad_()
