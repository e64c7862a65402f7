"""Rows of `bench state` on memory."""

from __future__ import annotations

from esper_ray.bench.rows import Row, make_row
from esper_ray.grafting import GraftingMemory
from esper_ray.layers import LayerSeeds

_PARTS = {
    "state tensor": "columns",
    "transition history": "history",
    "transition count": "transition_count",
    "performance metrics": "metrics",
    "metrics valid": "metrics_valid",
    "alpha": "alpha",
    "generation": "generation",
}
_TELEMETRY_BYTES = 12  # float32 chunk mean, variance and gradient, on the host


def memory_rows(seeds: int) -> list[Row]:
    """What a seed costs, item by item, and a feature of a layer that carries seeds."""
    layer = LayerSeeds(seeds, seeds)
    state, bank = layer.state, layer.bank
    items = {name: state.get_buffer(b).nbytes / seeds for name, b in _PARTS.items()}
    items["faults"] = layer.faults.nbytes / seeds
    items["slot map"] = bank.slot_of_seed.nbytes / seeds
    held = sum(t.nbytes for t in (*bank.parameters(), *bank.buffers())) - bank.slot_of_seed.nbytes
    accumulators = sum(b.nbytes for b in layer.telemetry.buffers())
    rows = [make_row(f"memory: {name}", size, "bytes/seed") for name, size in items.items()]
    return [
        *rows,
        make_row("memory: a seed not in GRAFTING", sum(items.values()), "bytes/seed", 150),
        make_row("memory: more in GRAFTING, host", GraftingMemory.BYTES_PER_ROW, "bytes/seed"),
        make_row("memory: telemetry of a chunk, host", _TELEMETRY_BYTES, "bytes/seed"),
        make_row("memory: telemetry accumulators", accumulators / seeds, "bytes/feature"),
        make_row("memory: a slot of a bank", held / bank.num_slots, "bytes/slot"),
        make_row("memory: slots of a bank without a grown seed", bank.num_slots, "slots"),
    ]
