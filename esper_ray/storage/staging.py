"""Copies of tensors that change in place, taken without making the training thread wait."""

from __future__ import annotations

import threading
from collections.abc import Mapping
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
    lock, for which they might wait long otherwise. CUDA tensors are copied on the current stream, so before whatever
    changes them next, and reach pinned memory on a stream of their own: nothing here waits for the
    device.
    """

    def __init__(self, count: int = BUFFERS) -> None:
        self._free = [_Buffers() for _ in range(count)]
        self._lock = threading.Lock()
        self.refused = 0

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> Staged | None:
        """Copies of tensors of one device; None, counted, if no set is free."""
        with self._lock:
            if not self._free:
                self.refused += 1
                return None
            buffers = self._free.pop()
        try:
            return Staged(self, buffers, buffers.fill(tensors))
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
        self._pairs: dict[str, tuple[tuple[int, int], memoryview, memoryview]] = {}
        self._stream: torch.cuda.Stream | None = None
        self._arrived: torch.cuda.Event | None = None

    def fill(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        on_cuda = any(tensor.is_cuda for tensor in tensors.values())
        host = {n: _like(self._host, n, t, "cpu", pin=on_cuda) for n, t in tensors.items()}
        if on_cuda:
            self._through_device(tensors, host)
        else:
            self._through_memory(tensors, host)
        return host

    def _through_memory(self, tensors: Mapping[str, Tensor], host: Mapping[str, Tensor]) -> None:
        """Copy without torch, which would let go of the interpreter's lock for every tensor."""
        for name, tensor in tensors.items():
            pair, place = self._pairs.get(name), (tensor.data_ptr(), host[name].data_ptr())
            if pair is None or pair[0] != place:
                pair = (place, _memory(host[name]), _memory(tensor))
                self._pairs[name] = pair
            pair[1][:] = pair[2]

    def _through_device(self, tensors: Mapping[str, Tensor], host: Mapping[str, Tensor]) -> None:
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

    def arrived(self) -> None:
        """Wait for copies from a device."""
        if self._arrived is not None:
            self._arrived.synchronize()


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor of the host, shared."""
    flat = tensor.detach().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())


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
