"""Copies of tensors that change in place, taken without making the training thread wait."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

BUFFERS: Final = 3


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A tensor to copy, whole or only the entries `index` (int64) of one dimension."""

    tensor: Tensor
    index: Tensor | None = None
    dim: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the copy."""
        shape = list(self.tensor.shape)
        if self.index is not None:
            shape[self.dim] = len(self.index)
        return tuple(shape)

    def copy_to(self, out: Tensor) -> None:
        """Copy on the current stream."""
        if self.index is None:
            out.copy_(self.tensor)
        else:
            torch.index_select(self.tensor, self.dim, self.index, out=out)


class Staged:
    """One copy of everything; its memory is used again after `release`."""

    def __init__(self, owner: StagingBuffers, buffers: _Buffers, views: dict[str, Tensor]) -> None:
        self._owner, self._buffers, self._views = owner, buffers, views

    def tensors(self) -> Mapping[str, Tensor]:
        """The copies on the host, after they have arrived; valid until `release`."""
        self._buffers.arrived()
        return self._views

    def release(self) -> None:
        """Give the memory back; twice is as once."""
        buffers, self._views = self._buffers, {}
        self._owner.give_back(buffers)


class StagingBuffers:
    """Three sets of buffers, filled by the training thread and emptied by another.

    The memory is kept from one copy to the next. CUDA tensors are copied on the current stream, so
    before whatever changes them next, and reach pinned memory on a stream of their own: nothing
    here waits for the device.
    """

    def __init__(self, count: int = BUFFERS) -> None:
        self._free = [_Buffers() for _ in range(count)]
        self._lock = threading.Lock()
        self.refused = 0

    @torch.no_grad()
    def take(self, sources: Mapping[str, Source]) -> Staged | None:
        """Copies of all sources, which live on one device; None, counted, if no set is free."""
        with self._lock:
            if not self._free:
                self.refused += 1
                return None
            buffers = self._free.pop()
        try:
            return Staged(self, buffers, buffers.fill(sources))
        except BaseException:
            self.give_back(buffers)
            raise

    def give_back(self, buffers: _Buffers) -> None:
        """Make a set available again; called by `Staged.release`."""
        with self._lock:
            if buffers not in self._free:
                self._free.append(buffers)


class _Buffers:
    """Memory on the host, and on the device where the tensors live there."""

    def __init__(self) -> None:
        self._host: dict[str, Tensor] = {}
        self._device: dict[str, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._arrived: torch.cuda.Event | None = None

    def fill(self, sources: Mapping[str, Source]) -> dict[str, Tensor]:
        on_cuda = any(source.tensor.is_cuda for source in sources.values())
        host = {n: _view(self._host, n, s, "cpu", pin=on_cuda) for n, s in sources.items()}
        if not on_cuda:
            for name, source in sources.items():
                source.copy_to(host[name])
            return host
        self._through_device(sources, host)
        return host

    def _through_device(self, sources: Mapping[str, Source], host: Mapping[str, Tensor]) -> None:
        device = next(iter(sources.values())).tensor.device
        with torch.cuda.device(device):
            if self._stream is None:
                self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            views = {n: _view(self._device, n, s, device) for n, s in sources.items()}
            for name, source in sources.items():
                source.copy_to(views[name])
            # What follows runs beside the step; the device's copies are not touched before.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for name, view in views.items():
                    host[name].copy_(view, non_blocking=True)
                assert self._arrived is not None
                self._arrived.record(self._stream)

    def arrived(self) -> None:
        if self._arrived is not None:
            self._arrived.synchronize()


def _view(
    held: dict[str, Tensor],
    name: str,
    source: Source,
    device: torch.device | str,
    pin: bool = False,
) -> Tensor:
    """Memory for one copy, made where what is held is too small or of another type."""
    shape, dtype = source.shape, source.tensor.dtype
    count = 1
    for length in shape:
        count *= length
    memory = held.get(name)
    if memory is None or memory.dtype != dtype or memory.numel() < count:
        memory = torch.empty(count, dtype=dtype, device=device, pin_memory=pin)
        held[name] = memory
    return memory[:count].view(shape)
