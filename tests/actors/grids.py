"""Runs of small models over several actors, with seeds in every state, and what they say."""

from __future__ import annotations

import asyncio
import multiprocessing
import pickle
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper_ray.actors.layer_actor import (
    CONCURRENCY_GROUPS,
    METHOD_GROUPS,
    LayerActor,
    Wiring,
)
from esper_ray.actors.pipeline import LocalPipeline
from esper_ray.actors.sharding import merged_reports
from esper_ray.config import parse_config
from esper_ray.errors import RunFailed
from esper_ray.events.messages import StageReport
from esper_ray.growth import shard_rows, snapshot
from esper_ray.growth.spec import StageSpec
from esper_ray.growth.stage import Stage
from esper_ray.keyed_random import keyed_uniform, stream_key
from esper_ray.lifecycle import ExtendedLifecycle as S
from esper_ray.planning import RunPlan, plan_run
from esper_ray.storage import Root
from tests.builders import PATHS, transitions

SEEDS, STEPS, RUN_EPOCH = 12, 2, 1
Tensors = dict[str, Tensor]


def plan_of(stages: int, shards: int, micro_batches: int, **train: Any) -> RunPlan:
    """A run whose chunks are ragged: 12 seeds on 16 features, and on 13."""
    return plan_run(
        parse_config(
            {
                "run": "grid",
                "data": {
                    "args": {"window": 4, "cap_bytes": 60_000},
                    "batch_size": 12,
                    "evaluation_samples": 600,
                },
                "model": {
                    "factory": "tests.models_for_tests:pieces",
                    "args": {"stages": stages, "width": 13},
                },
                "train": {"micro_batches": micro_batches, "precision": "float64", **train},
                "seeds": {
                    "targets": ["*.wide", "*.narrow"],
                    "seeds_per_layer": SEEDS,
                    "epoch_steps": STEPS,
                    "blueprint": "input_chunk_mlp",
                    "hidden": 4,
                    "warmup_steps": 0,
                    "grafting": {"strategy": "linear", "ramp_epochs": 2},
                },
                "cluster": {"shards": shards},
            }
        )
    )


def populate(stage: Stage) -> None:
    """Bring seed i of each layer to state i, by number, and give it weights of its own."""
    for layer_id, trainer in stage.trainers.items():
        layer = trainer.layer
        first = layer.first_seed
        for row in range(layer.state.num_seeds):
            path = PATHS[S((first + row) % len(S))]
            for source, target in pairwise(path):
                born = 0 if target is S.GERMINATED else -1
                batch = transitions(
                    [row], source, target, layer_id=layer_id, blueprint_id=born, strategy=born
                )
                assert stage.apply(batch).applied.all()
        held = (layer.bank.slot_of_seed >= 0).nonzero().flatten()
        slots = layer.bank.slots(held)
        with torch.no_grad():
            for name, weight in layer.bank.weights.items():
                key, each = stream_key("test", layer_id, name), weight[0].numel()
                values = keyed_uniform(key, held + first, each).view(-1, *weight.shape[1:]) - 0.5
                weight[slots] = values.to(weight.dtype)


@dataclass(frozen=True)
class Told:
    """What a stage, or a shard of it, says after some steps."""

    spec: StageSpec
    report: StageReport
    gradients: Tensors
    grown: dict[str, Tensors]

    @classmethod
    def of(cls, stage: Stage, report: StageReport) -> Told:
        gradients = {
            f"parameter/{n}": p.grad for n, p in stage.host_parameters.items() if p.grad is not None
        }
        grown = {
            name: shard_rows.renumbered(
                snapshot.grown_tensors(trainer.layer), trainer.layer.first_seed
            )
            for name, trainer in stage.trainers.items()
        }
        return cls(stage.spec, report, gradients, grown)


class ProbedActor(LayerActor):
    """A LayerActor that a test can populate and ask."""

    def populate(self) -> None:
        populate(self._stage)

    def finish(self, epoch: int) -> Told:
        return Told.of(self._stage, self._stage.end_epoch(epoch))


def reference(plan: RunPlan, root: Root, epochs: int) -> list[Told]:
    """The same in one process, without shards."""
    pipeline = LocalPipeline(plan.stages, root, None, RUN_EPOCH)
    for stage in pipeline.stages:
        populate(stage)
    told: list[Told] = []
    for epoch in range(epochs):
        for step in range(epoch * STEPS, (epoch + 1) * STEPS):
            pipeline.run_step(step)
        told = [Told.of(stage, stage.end_epoch(epoch)) for stage in pipeline.stages]
    return told


class Quiet:
    """A coordinator's handle that nobody hears."""

    def tell(self, method: str, *args: object) -> None:
        """Drop it."""


class ThreadActor:
    """A handle with RemoteActor's calls; arguments and results are copied as Ray copies them."""

    def __init__(self, actor: LayerActor) -> None:
        self.actor = actor
        self._pools = {n: ThreadPoolExecutor(threads) for n, threads in CONCURRENCY_GROUPS.items()}

    def submit(self, method: str, *args: object) -> Future[Any]:
        copied = pickle.loads(pickle.dumps(args))
        pool = self._pools[METHOD_GROUPS.get(method, "compute")]
        return pool.submit(getattr(self.actor, method), *copied)

    def tell(self, method: str, *args: object) -> None:
        self.submit(method, *args)

    async def ask(self, method: str, *args: object) -> Any:
        return await asyncio.wrap_future(self.submit(method, *args))

    def close(self) -> None:
        self.actor.abort("the test is over")
        for pool in self._pools.values():
            pool.shutdown()


class ProcessActor:
    """An actor in a process of its own, for process groups; it takes one call at a time."""

    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload(["ray", "tests.actors.grids"])

    def __init__(self, spec: StageSpec, root: Root, timeout_s: float) -> None:
        self._here, there = self._context.Pipe()
        self.process = self._context.Process(
            target=_serve, args=(there, spec, root.url, timeout_s), daemon=True
        )
        self.process.start()
        self._pool = ThreadPoolExecutor(1)

    def submit(self, method: str, *args: object) -> Future[Any]:
        return self._pool.submit(self._call, method, args)

    def _call(self, method: str, args: tuple[object, ...]) -> Any:
        self._here.send((method, args))
        answer = self._here.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self._pool.shutdown()


def _serve(there: Connection, spec: StageSpec, url: str, timeout_s: float) -> None:
    torch.set_num_threads(1)
    actor = ProbedActor(spec, Root.open(url), timeout_s)
    while True:
        method, args = there.recv()
        try:
            answer = getattr(actor, method)(*args)
        except (RunFailed, RuntimeError) as error:
            answer = error
        there.send(answer)


def actors_of(
    plan: RunPlan, root: Root, transport: str, timeout_s: float = 30
) -> Sequence[ThreadActor | ProcessActor]:
    """The actors of a run, by rank, set up for a transport."""
    places = map(plan.grid.place, range(plan.grid.world))
    specs = [replace(plan.stages[stage], shard=shard) for stage, shard in places]
    actors: list[Any]
    meeting = None
    if transport == "torch_dist":
        actors = [ProcessActor(spec, root, timeout_s) for spec in specs]
        meeting = actors[0].submit("open_store", plan.grid.world, RUN_EPOCH).result(60)
    else:
        actors = [ThreadActor(ProbedActor(spec, root, timeout_s)) for spec in specs]
    for rank, actor in enumerate(actors):
        wiring = Wiring(plan.grid, rank, [] if meeting else actors, meeting)
        if meeting is None:  # in turn: building a stage draws from torch's own generator
            actor.actor.setup(wiring, Quiet(), None, RUN_EPOCH)
    if meeting is not None:
        setups = [(Wiring(plan.grid, r, [], meeting), Quiet()) for r in range(len(actors))]
        pending = [
            actor.submit("setup", *given, None, RUN_EPOCH)
            for actor, given in zip(actors, setups, strict=True)
        ]
        for call in pending:
            call.result(60)
    return actors


def everyone(actors: Sequence[Any], method: str, *args: object) -> list[Any]:
    """What all of them answer."""
    return [call.result(60) for call in [actor.submit(method, *args) for actor in actors]]


def train(actors: Sequence[Any], epochs: int) -> list[Told]:
    """Populate the layers, train so many epochs, and hear what everybody says."""
    everyone(actors, "populate")
    told: list[Told] = []
    for epoch in range(epochs):
        for step in range(epoch * STEPS, (epoch + 1) * STEPS):
            everyone(actors, "run_step", step)
        told = everyone(actors, "finish", epoch)
    return told


def by_stage(told: Sequence[Told]) -> list[list[Told]]:
    """Those of each stage, in the order of its shards."""
    stages = max(one.spec.index for one in told) + 1
    return [[one for one in told if one.spec.index == index] for index in range(stages)]


def whole_gradients(shards: Sequence[Told]) -> Tensors:
    """The gradients of a stage's host: common ones are checked to be the same on all shards."""
    own = [shard_rows.split_tensors(told.spec, told.gradients) for told in shards]
    for _, common in own[1:]:
        assert all(torch.equal(value, own[0][1][name]) for name, value in common.items())
    return own[0][1] | shard_rows.joined_tensors([rows for rows, _ in own])


def whole_grown(shards: Sequence[Told], layer_id: str) -> Tensors:
    """Weights and moments of a layer's seeds, by seed id."""
    return shard_rows.joined_tensors([told.grown[layer_id] for told in shards])


def whole_report(shards: Sequence[Told]) -> StageReport:
    """What the coordinator makes of the shards' reports."""
    [report] = merged_reports([told.report for told in shards])
    return report


def relative(found: Any, expected: Any) -> float:
    """The largest difference, over the largest value; NaN must meet NaN."""
    one, other = (np.asarray(value, dtype=np.float64) for value in (found, expected))
    assert one.shape == other.shape
    assert np.array_equal(np.isnan(one), np.isnan(other))
    if not one.size:
        return 0.0
    scale = max(np.nanmax(np.abs(other), initial=0.0), 1e-30)
    return float(np.nanmax(np.abs(one - other), initial=0.0) / scale)
