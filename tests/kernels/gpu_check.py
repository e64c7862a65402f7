"""Checks of the kernels on a CUDA device: errors against float64, waits, graphs, compilation."""

from __future__ import annotations

import itertools
import time

import torch
from torch import nn

from esper_ray.bench.layer_case import LayerCase
from esper_ray.blueprints import BlueprintShape
from esper_ray.growth.seed_trainer import SeedTrainer
from esper_ray.growth.slot_adam import SlotAdamSettings
from esper_ray.growth.spec import SeedSpec
from esper_ray.layers import ChunkedKasminaLayer
from esper_ray.lifecycle import Budgets, ExtendedLifecycle, LifecycleManager, Refusal
from esper_ray.seeds import ChunkManager
from tests.kernels.cases import FUSED, LIMITS, Case, error
from tests.kernels.moves import RULES, Life
from tests.kernels.step_cases import StepCase, check

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    (37, 50, 201, 8, 0.3),
    (64, 32, 128, 8, 1.0),
    (333, 64, 4096, 16, 0.3),
    (333, 4, 128, 408, 1.0),
)


def worst_errors() -> dict[str, float]:
    """Largest error over its limit, by kernel, dtype and what was computed."""
    found: dict[str, float] = {}
    for name, dtype, (samples, seeds, width, hidden, share) in itertools.product(
        FUSED, DTYPES, SHAPES
    ):
        ids = torch.randperm(seeds)[: max(1, round(share * seeds))].sort().values
        chunks = ChunkManager(width, seeds)
        case = Case(name, samples, chunks, hidden, 24, ids, dtype, "cuda", seed=len(found))
        ours, right = case.run(in_place=False)
        for key, value in right.items():
            if value.any():
                label = f"{name}/{str(dtype)[6:]}/{'out' if key == 'out' else 'd' + key}"
                found[label] = max(found.get(label, 0.0), error(ours[key], value))
    return found


def never_waits() -> None:
    """Forward and backward, dormant and at work, with waits forbidden."""
    for active in (0.0, 0.1):
        case = LayerCase(64, 400, 100, 8, 128, active, "cuda", torch.bfloat16)
        layer, _ = case.build()
        x, g = case.batches(1)[0], torch.randn(128, 400, device="cuda", dtype=torch.bfloat16)
        layer(x).backward(g)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(10):
                layer(x).backward(g)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def memory_is_flat(cycles: int = 1000) -> set[tuple[int, int]]:
    """(allocated, reserved) bytes at three moments of many births and ends: one pair if flat."""
    host = nn.Linear(64, 4000, device="cuda")
    layer = ChunkedKasminaLayer(host, 1000, hidden=8, device="cuda")
    budgets = Budgets(embargo_epochs=0)
    layer.manager = LifecycleManager(minimum_epochs={}, replanting=True, budgets=budgets)
    x, seen = torch.randn(32, 64, device="cuda"), set()
    for cycle in range(cycles):
        ids = [(cycle * 37 + j) % 1000 for j in range(20)]
        for action in ("germinate", "cancel", "replant"):
            assert set(layer.request(action, ids)) == {Refusal.NONE}
        layer(x).sum().backward()
        layer.zero_grad(set_to_none=True)
        if cycle in (50, cycles // 2, cycles - 1):
            torch.cuda.synchronize()
            seen.add((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    return seen


def worst_steps() -> float:
    """Largest error of the fused step over its limit: 1,000 slots of which a tenth is stepped."""
    worst, slots = 0.0, 1000
    for name, chunk, hidden in itertools.product(FUSED, (4, 48, 300), (8, 32)):
        listed = torch.randperm(slots)[:120]
        moves = torch.zeros(slots, dtype=torch.bool)
        moves[listed[:100]] = True
        sizes = torch.tensor([0.0, 1e-3, 0.3, 50.0, torch.nan, torch.inf])
        worst = max(
            worst,
            check(
                StepCase(
                    name,
                    BlueprintShape(chunk, hidden, 24),
                    SlotAdamSettings(lr=0.02),
                    listed,
                    moves,
                    torch.rand(slots) < 0.2,
                    sizes[torch.randint(0, len(sizes), (4, slots))],
                    "cuda",
                )
            ),
        )
    return worst


class Steps:
    """Training steps of a layer of 1,000 seeds, `active` of which are blended and stepped."""

    def __init__(self, active: int, kernel: str = "auto", device: str = "cuda") -> None:
        torch.manual_seed(1)
        host = nn.Linear(64, 4000, device=device)
        self.layer = ChunkedKasminaLayer(host, 1000, hidden=8, device=device, kernel=kernel)
        ids, state = torch.arange(active, device=device) * 7 % 1000, self.layer.state
        self.layer.bank.reset(ids, state.generation[ids], "check")
        state.columns[state.LIFECYCLE_STATE, ids] = int(ExtendedLifecycle.FINE_TUNING)
        state.alpha[ids] = 1.0
        self.layer.refresh()
        self.trainer = SeedTrainer(self.layer, SeedSpec(hidden=8), epoch_steps=10**9)
        self.x = torch.randn(32, 64, device=device)
        self.g = torch.randn(32, 4000, device=device)

    def take(self) -> None:
        """One step but for the host's optimiser."""
        self.layer.base_layer.zero_grad(set_to_none=True)
        self.trainer.begin_step()
        self.layer(self.x).backward(self.g)
        self.trainer.train_seeds()
        self.trainer.step()

    def microseconds(self, runs: int = 500) -> float:
        """What `SeedTrainer.step` takes, one launch after the other."""
        self.take()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(runs):
            self.trainer.step()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / runs * 1e6


def steps_never_wait() -> None:
    """Whole steps, dormant and at work, with waits forbidden."""
    for active in (0, 100):
        steps = Steps(active)
        steps.take()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(10):
                steps.take()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def graph_is_eager() -> bool:
    """Whether replayed steps leave every bit of a bank as steps without a graph do."""
    ours, plain = Steps(100), Steps(100)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(9):  # the ninth forward is sampled for telemetry, the captured one is not
            ours.take()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.take()
    for _ in range(5):
        graph.replay()
    for _ in range(14):
        plain.take()
    found, right = ours.layer.bank.tensors(), plain.layer.bank.tensors()
    return all(torch.equal(found[name], value) for name, value in right.items())


def tick_agrees(seeds: int = 10_000, epochs: int = 50) -> None:
    """The tick against numpy to the bit, over random moves; after four epochs a graph."""
    for rules in RULES:
        life = Life(seeds, "cuda", rules, seed=1)
        for _ in range(4):  # compiles every form of the kernel
            life.live()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # an error if it waited for anything
            life.ticks.tick()
        life.both = graph.replay
        for _ in range(epochs - 4):
            life.live()
        life.compare()


if __name__ == "__main__":
    tick_agrees()
    print("tick: the same bits as numpy, eager and in a graph")
    never_waits()
    print("never waits: ok")
    flat = memory_is_flat()
    print(f"memory: {flat} {'ok' if len(flat) == 1 else 'GROWS'}")
    step_error = worst_steps()
    print(f"{'fused step, 10 % of 1,000 slots':40} {step_error:.2f} of its limit, ", end="")
    print("ok" if step_error < 1 else "OVER")
    steps_never_wait()
    print("steps never wait: ok")
    print(f"steps in a graph: {'ok' if graph_is_eager() else 'DIFFER'}")
    for active, kernel in itertools.product((0, 100, 1000), ("auto", "torch")):
        taken = Steps(active, kernel).microseconds()
        print(f"step, {active} of 1,000 seeds, {kernel}: {taken:.1f} us")
    errors = worst_errors()
    for label, value in sorted(errors.items()):
        dtype = getattr(torch, label.split("/")[1])
        print(f"{label:40} {value:.2e} {'ok' if value < LIMITS[dtype] else 'OVER'}")
