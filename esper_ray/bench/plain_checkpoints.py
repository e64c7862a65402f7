"""What a layer's checkpoint would cost otherwise, and what the machine takes for its parts."""

from __future__ import annotations

import itertools
import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from esper_ray.actors.layer_rows import seed_record
from esper_ray.growth import snapshot
from esper_ray.layers import LayerSeeds

_FILES = 100
_TIMES = 7


class PlainCheckpoints:
    """A file per seed by `torch.save`, a layer by torch.distributed.checkpoint, and controls."""

    def __init__(self, layer: LayerSeeds, folder: Path) -> None:
        self._layer, self._folder = layer, folder
        self._names = (folder / f"{number:08d}" for number in itertools.count())
        folder.mkdir(parents=True)

    def measure(self) -> dict[str, float]:
        """Median milliseconds of each."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            return self._measure()

    def _measure(self) -> dict[str, float]:
        tensors = self._tensors()
        copies = [torch.empty_like(value) for value in tensors.values()]
        found = {
            "control/fsync of 4 kB": _median(self._fsync, 3 * _TIMES),
            "control/memcpy of a layer": _median(lambda: _copy(copies, tensors), 10 * _TIMES),
            "torch.save/1,000 seeds, a file each": self._per_seed(durable=False),
            "torch.save/1,000 seeds, a file each, fsync": self._per_seed(durable=True),
            "torch.distributed.checkpoint/layer saved": _median(self._dcp_save),
        }
        stored = next(self._names)
        save(tensors, checkpoint_id=stored, no_dist=True)
        loads = _median(lambda: load(tensors, checkpoint_id=stored, no_dist=True))
        found["torch.distributed.checkpoint/layer restored"] = loads
        for path in self._folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return found

    def _tensors(self) -> dict[str, Tensor]:
        """The bytes that staging copies, as one state dict."""
        state, bank = self._layer.state, self._layer.bank
        found = {name: state.get_buffer(name).clone() for name in snapshot.STATE_BUFFERS}
        for part, tensors in (("weights", bank.tensors()), ("rollback", bank.copies())):
            found |= {f"{part}/{name}": value.clone() for name, value in tensors.items()}
        return found

    def _fsync(self) -> None:
        with next(self._names).open("wb") as file:
            file.write(b"x" * 4_096)
            file.flush()
            os.fsync(file.fileno())

    def _per_seed(self, *, durable: bool) -> float:
        """Milliseconds for 1,000 seeds that hold weights, from _FILES of them."""
        state = self._layer.state
        held = np.flatnonzero(state.host("columns")[state.BLUEPRINT_ID] >= 0)
        records = [seed_record(self._layer, int(seed)) for seed in held[:_FILES]]
        began = time.perf_counter()
        for state_data, weights in records:
            with next(self._names).open("wb") as file:
                torch.save({"state_data": state_data, "blueprint_state": weights}, file)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
        return (time.perf_counter() - began) * 1e3 * 1_000 / len(records)

    def _dcp_save(self) -> None:
        save(self._tensors(), checkpoint_id=next(self._names), no_dist=True)


def _copy(copies: list[Tensor], tensors: dict[str, Tensor]) -> None:
    for copy, value in zip(copies, tensors.values(), strict=True):
        copy.copy_(value)


def _median(call: Callable[[], object], times: int = _TIMES) -> float:
    found = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        found.append((time.perf_counter() - began) * 1e3)
    return float(np.median(found))
