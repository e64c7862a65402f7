"""`bench layer`: a layer with seeds against its bare host and against a loop over seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from esper_ray.bench.gpt import step_ratios
from esper_ray.bench.layer_case import LayerCase, PlainLoop
from esper_ray.bench.pairs import Ratio, compare, cpu_seconds, cuda_seconds
from esper_ray.bench.rows import Row, make_row
from esper_ray.errors import ConfigError
from esper_ray.layers import ChunkedKasminaLayer
from esper_ray.layers.telemetry import EVERY_FORWARD

PAIRS: Final = 30
_ROUNDS: Final = EVERY_FORWARD  # a round holds exactly one sampled forward
_BF16, _F32 = torch.bfloat16, torch.float32

_WIDE: Final = (10_000, 40_000, 8)
_CUDA: Final = (_WIDE, (1_000, 16_000, 16), (1_000, 64_000, 16))
_CUDA_TARGETS: Final[dict[tuple[float, bool, str], float]] = {
    (0.0, True, "forward"): 1.01,
    (0.0, False, "forward"): 1.01,
    (0.01, True, "forward"): 1.03,
    (0.01, False, "forward"): 1.03,
    (0.01, True, "training"): 1.05,
    (0.01, False, "training"): 1.05,
    (0.1, False, "forward"): 1.05,
    (0.1, False, "training"): 1.10,
    (0.1, True, "forward"): 1.08,
    (0.1, True, "training"): 1.15,
    (1.0, True, "forward"): 1.20,
    (1.0, True, "training"): 1.35,
}
"""(share at work, chunks of 4 features, pass) -> largest ratio, by kernels.md."""

_CPU: Final = ((512, 1_024, 1_000, 8, 64), (512, 40_000, 10_000, 8, 64))
_CPU_TARGETS: Final = {0.0: 1.05, 0.1: 1.3}
_LOOP_TARGET: Final = 100.0


def measure(device: str = "cpu", quick: bool = False) -> list[Row]:
    """Every row of a device; `quick` takes fewer pairs, for a look. ConfigError without a GPU."""
    pairs = 8 if quick else PAIRS
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch sees no CUDA device here", "leave --device out, or use a GPU host")
    if device == "cuda":
        from esper_ray.bench.tick import tick_rows  # needs triton

        rows = [row for rows in _cuda_rows(pairs) for row in rows]
        return [*rows, *_step_rows(pairs), *tick_rows(captured, pairs)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, one small operation can wait long on a busy machine
    try:
        return [row for rows in (_cpu_rows(pairs), _cpu_scaling(pairs)) for row in rows]
    finally:
        torch.set_num_threads(threads)


def _row(name: str, ratio: Ratio, target: float | None, floor: float | None = None) -> Row:
    """A ratio; it meets its target if the upper end of its interval does."""
    row = make_row(name, ratio.value, "ratio", target)
    row["met"] = target is None or ratio.high <= target
    return row | {
        "low": round(ratio.low, 4),
        "high": round(ratio.high, 4),
        "bare_ms": round(ratio.bare_ms, 4),
        "ours_ms": round(ratio.ours_ms, 4),
        "floor": None if floor is None else round(floor, 4),
    }


# ---- CPU -------------------------------------------------------------------------------------


def _cpu_rows(pairs: int) -> Iterator[Row]:
    for inputs, width, seeds, hidden, samples in _CPU:
        for active in (0.0, 0.01, 0.1):
            case = LayerCase(inputs, width, seeds, hidden, samples, active, "cpu", _F32)
            layer, _ = case.build()
            ratio, added = _added(layer, case, pairs)
            yield _row(f"{case.name}/forward", ratio, _CPU_TARGETS.get(active))
            if active < 0.1:
                yield _against_loop(case, layer, added)


def _added(layer: ChunkedKasminaLayer, case: LayerCase, pairs: int) -> tuple[Ratio, float]:
    """1 + added / bare, and seconds added per forward."""
    [x] = case.batches(1)
    base: nn.Module = layer.base_layer
    h = base(x).detach().requires_grad_()

    def bare() -> None:
        for _ in range(_ROUNDS):
            base(x)

    def ours() -> None:
        for _ in range(_ROUNDS):
            layer.blend(h, x, in_place=True)

    ratio = compare(bare, ours, cpu_seconds, pairs, extra=True)
    return ratio, ratio.ours_ms / 1e3 / _ROUNDS


def _against_loop(case: LayerCase, layer: ChunkedKasminaLayer, added: float) -> Row:
    [x] = case.batches(1)
    loop = PlainLoop(layer)
    ratio = compare(
        lambda: layer.base_layer(x), lambda: loop(x, telemetry=True), cpu_seconds, pairs=5
    )
    factor = (ratio.ours_ms - ratio.bare_ms) / 1e3 / added
    row = make_row(f"{case.name}/loop over ours", factor, "added time", None)
    if case.seeds == 10_000:
        row |= {"target": _LOOP_TARGET, "met": factor >= _LOOP_TARGET}
    return row


def _cpu_scaling(pairs: int) -> Iterator[Row]:
    """Time added per seed, for 4 features each, a tenth of them at work."""
    per_seed = {}
    for seeds in (1_000, 10_000, 100_000):
        case = LayerCase(16, seeds * 4, seeds, 8, 64, 0.1, "cpu", _F32)
        layer, _ = case.build()
        per_seed[seeds] = _added(layer, case, pairs)[1] / seeds
    for seeds, target in ((1_000, None), (100_000, 1.15)):
        value = per_seed[seeds] / per_seed[10_000]
        yield make_row(f"cpu/{seeds}/4/10%/added per seed, against 10,000", value, "ratio", target)
    case = LayerCase(512, 1_024, 1, 8, 64, 0.0, "cpu", _F32)
    yield _row("cpu/1/1024/0%/forward", _added(case.build()[0], case, pairs)[0], 1.05)


# ---- CUDA ------------------------------------------------------------------------------------


def _cuda_rows(pairs: int) -> Iterator[list[Row]]:
    copy_rate, flops = ceilings()
    for seeds, width, hidden in _CUDA:
        for active in (0.0, 0.01, 0.1, 1.0):
            case = LayerCase(4_096, width, seeds, hidden, 2_048, active, "cuda", _BF16)
            floor = Floor(case, copy_rate, flops)
            yield _cuda_case(case, floor, pairs)
            torch.cuda.empty_cache()


def _step_rows(pairs: int) -> Iterator[Row]:
    """Whole training steps of a GPT."""
    for mode, wrap in (("", lambda run: run), (" in a graph", captured)):
        for name, ratio, target in step_ratios("cuda", wrap, cuda_seconds, pairs):
            yield _row(name + mode, ratio, target)
            torch.cuda.empty_cache()


@dataclasses.dataclass(frozen=True, slots=True)
class Floor:
    """What bytes and arithmetic alone would cost, as a ratio to the bare layer.

    One read and one write of the active chunks forward; three transfers more where they train. A
    chunk of 4 features moves the 32 bytes around it.
    """

    case: LayerCase
    bytes_per_s: float
    flops: float

    def ratio(self, training: bool) -> float:
        """The floor of a forward, or of forward and backward."""
        case = self.case
        near = max(1, 16 // (case.width // case.seeds))
        touched = 1 - (1 - case.active) ** near
        moved = touched * case.samples * case.width * 2 * (6 if training else 2)
        bare = (6 if training else 2) * case.samples * case.inputs * case.width / self.flops
        return 1 + moved / self.bytes_per_s / bare


def ceilings() -> tuple[float, float]:
    """Bytes per second of a large copy, and bf16 operations per second of a large product."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_(0, 255)
    b, p = torch.empty_like(a), torch.randn(8192, 8192, device="cuda", dtype=_BF16)
    copied = min(cuda_seconds(lambda: b.copy_(a)) for _ in range(10))
    product = min(cuda_seconds(lambda: p @ p) for _ in range(10))
    return 2 * a.numel() / copied, 2 * 8192**3 / product


def _cuda_case(case: LayerCase, floor: Floor, pairs: int) -> list[Row]:
    layer, _ = case.build()
    host = layer.base_layer
    batches = [x.requires_grad_() for x in case.batches(3)]
    g = torch.randn(case.samples, case.width, device="cuda", dtype=_BF16)
    narrow = case.width // case.seeds < 16
    rows = []
    for name, run in (("forward", _forward), ("training", _training)):
        target = _CUDA_TARGETS.get((case.active, narrow, name))
        bare, ours = (run(module, batches, g) for module in (host, layer))
        at = floor.ratio(name == "training")
        rows.append(
            _row(f"{case.name}/{name}", compare(bare, ours, cuda_seconds, pairs), target, at)
        )
        graphs = captured(bare), captured(ours)
        ratio = compare(*graphs, cuda_seconds, pairs)
        rows.append(_row(f"{case.name}/{name} in a graph", ratio, target, at))
        del graphs
    return [*rows, _memory(case, host, layer, batches, g)]


def _forward(module: nn.Module, batches: list[Tensor], g: Tensor) -> Callable[[], None]:
    del g

    def run() -> None:
        for number in range(_ROUNDS):
            module(batches[number % len(batches)])

    return run


def _training(module: nn.Module, batches: list[Tensor], g: Tensor) -> Callable[[], None]:
    parameters = list(module.parameters())

    def run() -> None:
        for number in range(_ROUNDS):
            x = batches[number % len(batches)]
            for leaf in (x, *parameters):
                leaf.grad = None
            handed: Tensor = _Hand.apply(module(x), g)  # type: ignore[no-untyped-call]
            handed.backward()  # type: ignore[no-untyped-call]

    return run


class _Hand(torch.autograd.Function):
    """Hands on the gradient g as a next layer would: as a tensor that nobody else holds."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, g: Tensor) -> Tensor:
        ctx.g = g
        return y.new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return from_dlpack(ctx.g), None


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """The same work as one CUDA graph."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(_: object = run) -> None:  # what the graph reads lives as long as this
        graph.replay()

    return replay


def _memory(
    case: LayerCase, host: nn.Module, layer: nn.Module, batches: list[Tensor], g: Tensor
) -> Row:
    """Peak of a training step beyond the bare layer's, in shares of the host's weights."""

    def peak(module: nn.Module) -> int:
        run = _training(module, batches, g)
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    weights = sum(p.nbytes for p in host.parameters())
    resident = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers())) - weights
    extra = peak(layer) - peak(host) + resident
    row = make_row(f"{case.name}/memory of a step", extra / weights, "of weights")
    if case.active <= 0.1:
        row |= {"target": 0.1, "met": extra / weights <= 0.1}
    return row | {"resident_bytes": resident}
