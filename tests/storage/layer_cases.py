"""A small layer to store: its schema, random rows of its seeds, and roots that misbehave."""

from __future__ import annotations

import threading
import uuid

import numpy as np
import torch
from numpy.typing import ArrayLike

from esper_ray.errors import StorageUnavailable
from esper_ray.storage.filesystem import Root
from esper_ray.storage.layer_rows import LayerSchema, Rows

LAYER = "encoder.3"
SCHEMA = LayerSchema(
    {
        "state": {"metrics": (np.dtype(np.float32), 4), "lifecycle": (np.dtype(np.int32), 0)},
        "grafting": {"pauses": (np.dtype(np.uint8), 0)},
    },
    {
        "weights": {
            "w": (torch.float32, (2, 3)),
            "steps": (torch.int32, ()),
            "h": (torch.half, (5,)),
        }
    },
    {"lifecycle": -1},
)


def rows_of(seed_ids: ArrayLike, seed: int = 0, weights: bool = True) -> Rows:
    """Random rows; every other seed has weights, every third a row in "grafting"."""
    ids, random = np.asarray(seed_ids, np.int32), np.random.default_rng(seed)
    held = ids[ids % 2 == 0] if weights else ids[:0]
    grafting = ids[ids % 3 == 0]
    keys = torch.from_numpy(held.copy())
    return Rows(
        {
            "state": {
                "seed_id": ids,
                "event_no": np.zeros(len(ids), np.int32),
                "metrics": random.random((len(ids), 4)).astype(np.float32),
                "lifecycle": random.integers(0, 11, len(ids)).astype(np.int32),
            },
            "grafting": {
                "seed_id": grafting,
                "event_no": np.zeros(len(grafting), np.int32),
                "pauses": random.integers(0, 255, len(grafting)).astype(np.uint8),
            },
        },
        {
            "weights": {
                "seed_id": keys,
                "event_no": torch.zeros_like(keys),
                "w": torch.from_numpy(random.random((len(held), 2, 3)).astype(np.float32)),
                "steps": torch.from_numpy(random.integers(0, 99, len(held)).astype(np.int32)),
                "h": torch.from_numpy(random.random((len(held), 5)).astype(np.float16)),
            }
        },
    )


def blueprint(value: float) -> dict[str, torch.Tensor]:
    """Tensors of one seed."""
    steps = torch.tensor(int(value), dtype=torch.int32)
    return {
        "w": torch.full((2, 3), float(value)),
        "steps": steps,
        "h": torch.full((5,), float(value)).half(),
    }


def same(one: Rows, other: Rows) -> bool:
    """Whether two sets of rows agree in every part, name and value."""
    tables = all(
        one.tables[part].keys() == other.tables[part].keys()
        and all(np.array_equal(one.tables[part][n], other.tables[part][n]) for n in table)
        for part, table in one.tables.items()
    )
    return tables and all(
        one.tensors[part].keys() == other.tensors[part].keys()
        and all(torch.equal(one.tensors[part][n], other.tensors[part][n]) for n in tensors)
        for part, tensors in one.tensors.items()
    )


class FaultyRoot(Root):
    """A store in memory that can be made to wait, or to refuse what is created."""

    gate: threading.Event
    refusals: int

    @classmethod
    def new(cls) -> FaultyRoot:
        root = cls.open(f"memory://{uuid.uuid4().hex}/run")
        assert isinstance(root, cls)
        root.gate, root.refusals = threading.Event(), 0
        root.gate.set()
        return root

    def create(self, path: str, data: bytes) -> None:
        assert self.gate.wait(30)
        if self.refusals:
            self.refusals -= 1
            raise StorageUnavailable(f"cannot write {self.url}/{path}: it is to fail")
        super().create(path, data)
