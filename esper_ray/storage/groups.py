"""What one commit of a layer's log adds: checkpoints of seeds, or rows of the layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper_ray.storage import row_codec
from esper_ray.storage.acknowledgement import SaveFuture
from esper_ray.storage.layer_rows import KEYS, STATE, WEIGHTS, Columns, LayerSchema, Rows, Tensors
from esper_ray.storage.seed_record import SeedRow

GROUP_ROWS: Final = 1_000
GROUP_BYTES: Final = 4 * 2**20


class SeedGroup:
    """Checkpoints of seeds that become one commit; each is a row of its own, none replaces another.

    Its memory is there from the start: at most GROUP_ROWS rows and about GROUP_BYTES bytes.
    """

    def __init__(self, seq: int, schema: LayerSchema, future: SaveFuture) -> None:
        self.seq, self.schema, self.future = seq, schema, future
        self.opened_at = time.monotonic()
        self.capacity = max(1, min(GROUP_ROWS, GROUP_BYTES // max(1, schema.row_bytes)))
        self.count, self._with_tensors = 0, list[int]()
        self._seed_ids = np.zeros(self.capacity, np.int32)
        self._state = {
            name: np.zeros((self.capacity, width) if width else self.capacity, kind)
            for name, (kind, width) in schema.tables[STATE].items()
        }
        self._others: dict[str, list[tuple[int, SeedRow]]] = {}
        self._weights: dict[str, Tensor] = {}
        self._copied: list[torch.cuda.Event] = []

    @property
    def full(self) -> bool:
        """Whether no further row fits."""
        return self.count == self.capacity

    @property
    def held_bytes(self) -> int:
        """Bytes that its rows take up at most."""
        return self.capacity * self.schema.row_bytes

    def add(self, seed_id: int, row: SeedRow) -> int:
        """Copy one row; return its event number in this group."""
        event_no = self.count
        self._seed_ids[event_no] = seed_id
        for name, value in row.tables[STATE].items():
            self._state[name][event_no] = value
        for part in row.tables.keys() - {STATE}:
            self._others.setdefault(part, []).append((event_no, row))
        if row.tensors is not None:
            self._add_tensors(row.tensors)
            self._with_tensors.append(event_no)
        self.count += 1
        return event_no

    @torch.no_grad()
    def _add_tensors(self, tensors: Any) -> None:
        at, on_cuda = len(self._with_tensors), False
        for name, tensor in tensors.items():
            if name not in self._weights:
                shape = (self.capacity, *tensor.shape)
                pinned = tensor.is_cuda
                self._weights[name] = torch.empty(shape, dtype=tensor.dtype, pin_memory=pinned)
            self._weights[name][at].copy_(tensor, non_blocking=True)
            on_cuda |= tensor.is_cuda
        if on_cuda:  # copies run on the stream of the step; the encoder waits for them
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._copied = [event]

    def rows(self) -> Rows:
        """All rows of the group, in the order of their events."""
        for event in self._copied:
            event.synchronize()
        events = np.arange(self.count, dtype=np.int32)
        ids = self._seed_ids[: self.count]
        tables: dict[str, Columns] = {}
        for part in self.schema.tables:
            if part == STATE:
                state = {name: value[: self.count] for name, value in self._state.items()}
                tables[part] = {"seed_id": ids, "event_no": events, **state}
            else:
                tables[part] = self._other(part)
        tensors = {part: row_codec.empty_tensors(t) for part, t in self.schema.tensors.items()}
        if self._with_tensors:
            tensors[WEIGHTS] = self._tensors(ids)
        return Rows(tables, tensors)

    def _tensors(self, ids: NDArray[np.int32]) -> Tensors:
        held = np.array(self._with_tensors, np.int32)
        found = {name: value[: len(held)] for name, value in self._weights.items()}
        keys = {"seed_id": torch.from_numpy(ids[held]), "event_no": torch.from_numpy(held)}
        return {**keys, **found}

    def _other(self, part: str) -> Columns:
        table = row_codec.empty_table(self.schema.tables[part])
        given = self._others.get(part, [])
        events = np.array([event for event, _ in given], np.int32)
        found: Columns = {"seed_id": self._seed_ids[events], "event_no": events}
        for name in table.keys() - set(KEYS):
            values = [row.tables[part][name] for _, row in given]
            found[name] = np.array(values, table[name].dtype).reshape(-1, *table[name].shape[1:])
        return {name: found[name] for name in table}

    def row(self, event_no: int) -> Rows:
        """One row of the group, copied."""
        return self.rows().only(event_no)


class LayerGroup:
    """Rows of the layer at one step, taken from where they were staged when they are encoded."""

    full = True

    def __init__(
        self, seq: int, step: int, collect: Callable[[], Rows], future: SaveFuture
    ) -> None:
        self.seq, self.step, self.collect, self.future = seq, step, collect, future
        self.opened_at = time.monotonic()


Group = SeedGroup | LayerGroup
