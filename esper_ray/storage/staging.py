"""Copies of tensors that change in place, taken without making the training thread wait."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

BUFFERS: Final = 3


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

    The memory is kept from one copy to the next, and copies on the host keep the interpreter's
    lock, for which they might wait long otherwise. CUDA tensors are copied on the current stream,
    so before whatever changes them next, and reach pinned memory on a stream of their own: nothing
    here waits for the device.
    """

    def __init__(self, count: int = BUFFERS) -> None:
        self._free = [_Buffers() for _ in range(count)]
        self._lock = threading.Lock()
        self.refused = 0

    @torch.no_grad()
    def take(
        self, tensors: Mapping[str, Tensor], seldom: Mapping[str, Tensor] | None = None
    ) -> Staged | None:
        """Copies of tensors of one device; None, counted, if no set is free.

        `seldom` are tensors that only torch's own operations outside of graphs change, and not
        often: on the host they are copied again where their version says that they were changed.
        """
        with self._lock:
            if not self._free:
                self.refused += 1
                return None
            buffers = self._free.pop()
        try:
            return Staged(self, buffers, buffers.fill(tensors, seldom or {}))
        except BaseException:
            self.give_back(buffers)
            raise

    def give_back(self, buffers: _Buffers) -> None:
        """Make a set available again; called by `Staged.release`."""
        with self._lock:
            if buffers not in self._free:
                self._free.append(buffers)


@dataclass(slots=True)
class _Pair:
    """The bytes of a tensor at one place, those of its copy, and which version was copied."""

    place: int
    copy: Tensor
    target: memoryview
    source: memoryview
    version: int | None = None


class _Buffers:
    """Memory on the host, and on the device where the tensors live there."""

    def __init__(self) -> None:
        self._host: dict[str, Tensor] = {}
        self._device: dict[str, Tensor] = {}
        self._pairs: dict[str, _Pair] = {}
        self._stream: torch.cuda.Stream | None = None
        self._arrived: torch.cuda.Event | None = None

    def fill(
        self, tensors: Mapping[str, Tensor], seldom: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        if any(tensor.is_cuda for tensor in tensors.values()):
            return self._through_device({**tensors, **seldom})
        copies = {name: self._copy(name, tensor, None) for name, tensor in tensors.items()}
        for name, tensor in seldom.items():
            copies[name] = self._copy(name, tensor, tensor._version)
        return copies

    def _copy(self, name: str, tensor: Tensor, version: int | None) -> Tensor:
        """Copy without torch, which would let go of the interpreter's lock for every tensor."""
        place, known = tensor.data_ptr(), self._pairs.get(name)
        if known is None or known.place != place or known.copy.shape != tensor.shape:
            copy = _like(self._host, name, tensor, "cpu")
            known = _Pair(place, copy, _memory(copy), _memory(tensor))
            self._pairs[name] = known
        if version is None or known.version != version:
            known.target[:] = known.source
            known.version = version
        return known.copy

    def _through_device(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        host = {n: _like(self._host, n, t, "cpu", pin=True) for n, t in tensors.items()}
        device = next(iter(tensors.values())).device
        with torch.cuda.device(device):
            if self._stream is None or self._arrived is None:
                self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copies = [_like(self._device, n, t, device) for n, t in tensors.items()]
            torch._foreach_copy_(copies, list(tensors.values()))
            # What follows runs beside the step; nobody writes the copies before it is done.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for one, copy in zip(host.values(), copies, strict=True):
                    one.copy_(copy, non_blocking=True)
                self._arrived.record(self._stream)
        return host

    def arrived(self) -> None:
        """Wait for copies from a device."""
        if self._arrived is not None:
            self._arrived.synchronize()


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor of the host, shared."""
    flat = tensor.detach().view(-1)
    return flat.view(torch.uint8).numpy().data


def _like(
    held: dict[str, Tensor],
    name: str,
    tensor: Tensor,
    device: torch.device | str,
    pin: bool = False,
) -> Tensor:
    """Memory for one copy, made where what is held is of another shape or type."""
    memory = held.get(name)
    if memory is None or memory.dtype != tensor.dtype or memory.shape != tensor.shape:
        memory = torch.empty(tensor.shape, dtype=tensor.dtype, device=device, pin_memory=pin)
        held[name] = memory
    return memory
