"""Files exactly as the seed documents' store and Phase 1 wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SECONDS = 1_700_000_000.25


def state(**changes: Any) -> dict[str, Any]:
    """State of a seed that is being blended in."""
    return {
        "lifecycle_state": 3,
        "blueprint_id": 1,
        "epochs_in_state": 7,
        "grafting_strategy": 2,
        "parent_state": 2,
        "evaluation_score": -120,
        "error_count": 3,
        "alpha_blend": 0.375,
        **changes,
    }


def record(
    layer_id: str = "encoder.3_b",
    seed_id: int = 2,
    state_data: Mapping[str, Any] | None = None,
    blueprint_state: Any = None,
    **changes: Any,
) -> dict[str, Any]:
    """A version 2 record as the second seed document saves it."""
    return {
        "version": 2,
        "layer_id": layer_id,
        "seed_id": seed_id,
        "timestamp": SECONDS,
        "state_data": state() if state_data is None else dict(state_data),
        "blueprint_state": blueprint_state,
        "metadata": {"pytorch_version": torch.__version__, "cuda_version": None},
        **changes,
    }


def record_in_ms(layer_id: str = "encoder.3_b", seed_id: int = 2, **changes: Any) -> dict[str, Any]:
    """A version 2 record as the original implementation saves it: ids and times in ms."""
    milliseconds = int(SECONDS * 1000)
    made = record(layer_id, seed_id, timestamp=milliseconds)
    made["metadata"]["device_name"] = "cpu"
    made |= {"checkpoint_id": f"{layer_id}_{seed_id}_{milliseconds}", "priority": "high"}
    return made | changes


def record_v1(code: int, layer_id: str = "encoder.3_b", seed_id: int = 2) -> dict[str, Any]:
    """A version 1 record, whose state is a code of Phase 1."""
    made = record(layer_id, seed_id, {"state": code, "blueprint_id": 1, "epochs_in_state": 7})
    made["version"] = 1
    return made


def save(folder: Path, made: Mapping[str, Any]) -> Path:
    """Write a record under its own name."""
    time = int(made["timestamp"])
    path = folder / f"{made['layer_id']}_{made['seed_id']}_{time}.pt"
    torch.save(dict(made), path)
    return path


def table() -> tuple[Tensor, Tensor]:
    """A Phase 1 table, (5, 4), a seed in every state, and its alphas."""
    rows = [[0, 0, 4, 0], [1, 1, 3, 1], [2, 1, 9, 0], [3, 2, 1, 2], [4, 1, 60, 0]]
    return torch.tensor(rows, dtype=torch.int32), torch.tensor([0.0, 0.25, 1.0, 0.5, 1.0])
