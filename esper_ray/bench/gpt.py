"""Whole training steps of a byte GPT whose MLPs carry seeds, against GPTs that carry none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from esper_ray.bench.pairs import Clock, Ratio, compare
from esper_ray.events.messages import TransitionBatch
from esper_ray.growth.seed_trainer import SeedTrainer
from esper_ray.growth.spec import SeedSpec
from esper_ray.layers import LayerSeeds, attach_seeds
from esper_ray.layers.telemetry import EVERY_FORWARD
from esper_ray.lifecycle import Cause, ExtendedLifecycle
from esper_ray.models.gpt import BYTES, ByteGPT
from esper_ray.models.gpt_size import LARGE, SMALL, GPTSize, same_parameters_mlp_width

_S = ExtendedLifecycle
_TO_GRAFTING: Final = (_S.DORMANT, _S.GERMINATED, _S.TRAINING, _S.GRAFTING)
DORMANT_TARGET: Final = 1.03
GRAFTED_TARGET: Final = 1.15


@dataclass(frozen=True, slots=True)
class GPTCase:
    """A host and what its seeds grow: hidden units of a seed by blueprint, "" for none at work."""

    name: str
    size: GPTSize
    samples: int
    seeds: int
    hidden: int
    blueprint: str = ""

    def seeded(self, device: str) -> Step:
        """The host with seeds on every MLP: all dormant, or all in GRAFTING at alpha 0.5."""
        model = _model(self.size, device)
        layers = []
        for number, block in enumerate(model.blocks):
            mlp = block.get_submodule("mlp")
            seeds = LayerSeeds(
                self.size.width,
                self.seeds,
                f"blocks.{number}.mlp",
                inputs=self.size.width,
                blueprint_name=self.blueprint or "bottleneck",
                hidden=self.hidden,
                host_weights=sum(p.numel() for p in mlp.parameters()),
            ).to(device)
            layers.append(attach_seeds(mlp, seeds).train())
        if self.blueprint:
            for seeds in layers:
                _graft(seeds)
        trainers = [
            SeedTrainer(seeds, SeedSpec(self.blueprint or "bottleneck"), 1) for seeds in layers
        ]
        return Step(model, self.samples, device, trainers)

    def bare(self, device: str) -> Step:
        """The host alone, as large as host and grown seeds together."""
        size = self.size
        if self.blueprint:
            extra = sum(
                t.layer.bank.weights_per_seed * self.seeds for t in self.seeded("cpu").trainers
            )
            wide = same_parameters_mlp_width(size, extra, multiple=8)
            size = GPTSize(size.layers, size.width, size.heads, size.context, wide)
        return Step(_model(size, device), self.samples, device, [])


CASES: Final = tuple(
    GPTCase(name, size, samples, seeds, hidden, blueprint)
    for name, size, samples, seeds, units in (
        ("gpt-0.9M", SMALL, 64, 4, {"": 408, "bottleneck": 408, "input_mlp": 160}),
        ("gpt-19M", LARGE, 96, 8, {"": 256, "bottleneck": 256, "input_mlp": 56}),
    )
    for blueprint, hidden in units.items()
)
"""Hosts, batches and sizes of seeds of the growth experiments: design/growth.md, section 3."""


class Step:
    """One call is a training step: forward, backward, clipping, AdamW, and that of the seeds."""

    def __init__(
        self, model: ByteGPT, samples: int, device: str, trainers: list[SeedTrainer]
    ) -> None:
        self.model, self.trainers, self._device = model, trainers, device
        own = {id(p) for trainer in trainers for p in trainer.layer.parameters()}
        self._host = [p for p in model.parameters() if id(p) not in own]
        self._optimizer = torch.optim.AdamW(
            self._host, lr=1e-4, fused=True, capturable=device == "cuda"
        )
        length = len(model.embedding.positions)
        draw = torch.Generator().manual_seed(0)
        data = torch.randint(0, BYTES, (samples, length + 1), generator=draw).to(device)
        self._x, self._y = data[:, :-1].contiguous(), data[:, 1:].reshape(-1)

    def __call__(self) -> None:
        """Train once."""
        for parameter in self._host:
            parameter.grad = None
        # Without the cache of casts, so that a CUDA graph can be captured.
        with torch.autocast(self._device, torch.bfloat16, cache_enabled=False):
            logits: Tensor = self.model(self._x)
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), self._y)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._host, 1.0)
        self._optimizer.step()
        for trainer in self.trainers:
            trainer.train_seeds()
            trainer.step()
            trainer.begin_step()


def step_ratios(
    device: str,
    wrap: Callable[[Callable[[], None]], Callable[[], object]],
    clock: Clock,
    pairs: int,
) -> Iterator[tuple[str, Ratio, float]]:
    """(name, ratio, target) of each case; what `wrap` makes of a round of steps is timed."""
    for case in CASES:
        bare, ours = (wrap(_round(make(device))) for make in (case.bare, case.seeded))
        target = GRAFTED_TARGET if case.blueprint else DORMANT_TARGET
        yield (
            f"{device}/{case.name}/{case.blueprint or 'dormant'}/step",
            (compare(bare, ours, clock, pairs)),
            target,
        )


def _round(step: Step) -> Callable[[], None]:
    def run() -> None:
        for _ in range(EVERY_FORWARD):  # holds exactly one sampled forward
            step()

    return run


def _model(size: GPTSize, device: str) -> ByteGPT:
    torch.manual_seed(0)
    return ByteGPT(size).to(device)


def _graft(layer: LayerSeeds) -> None:
    count = layer.state.num_seeds
    same = np.zeros(count, dtype=np.int32)
    for source, target in pairwise(_TO_GRAFTING):
        born = target == _S.GERMINATED
        layer.apply_transitions(
            TransitionBatch(
                number=0,
                epoch=0,
                layer_id=layer.layer_id,
                seed_ids=np.arange(count, dtype=np.int64),
                expected_state=same + source,
                expected_generation=np.zeros(count, dtype=np.int16),
                target=same + target,
                cause=same + Cause.POLICY,
                blueprint_id=same + (layer.bank.kind.blueprint_id if born else -1),
                strategy=same - (not born),
                checkpoint_id=same - 1,
            )
        )
    layer.state.alpha.fill_(0.5)
    layer.state.changed()
    layer.refresh()
