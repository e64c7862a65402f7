"""Buffers of a module as numpy arrays that control code reads and writes, wherever they live."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


class Latch:
    """A mutex that copies and pickles as a new one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Latch], tuple[()]]:
        return Latch, ()

    def __enter__(self) -> None:
        """Wait for it and take it."""
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        """Give it back."""
        self._lock.release()


class ExactBuffers(nn.Module):
    """A module whose buffers keep their dtype when it is cast: they hold codes, counts and sums."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            buffer = self._buffers[name]
            if buffer is not None and old is not None and buffer.dtype != old.dtype:
                self._buffers[name] = old.to(buffer.device)
        return self


class MirroredBuffers(ExactBuffers):
    """A module whose buffers have host faces.

    On the CPU a face shares the buffer's memory. Elsewhere it is a copy: whoever writes it also
    sends what changed, and reading never waits for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._latch = Latch()
        self._mirror: dict[str, NDArray[Any]] = {}
        self._elsewhere: bool | None = None
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    @property
    def mirrored(self) -> bool:
        """Whether host faces are copies."""
        if self._elsewhere is None:
            self._elsewhere = any(buffer.device.type != "cpu" for buffer in self.buffers())
        return self._elsewhere

    def host(self, name: str) -> NDArray[Any]:
        """The face of one buffer."""
        face = self._mirror.get(name)
        if face is None:
            buffer = self._buffers[name]
            if buffer is None:
                raise AttributeError(f"no buffer is named {name!r}")
            face = self._mirror[name] = _face(buffer, copied=self.mirrored)
        return face

    def changed(self) -> None:
        """Make every face anew after buffers were loaded or replaced from outside."""
        self._mirror.clear()
        self._elsewhere = None

    def send(self, rows: NDArray[np.int64], *names: str) -> None:
        """Bring some rows, the last dimension, of some faces to the device in one copy."""
        if not self.mirrored:
            return
        faces = {name: np.ascontiguousarray(self.host(name)[..., rows]) for name in names}
        order = sorted(names, key=lambda name: -faces[name].itemsize)  # keeps all aligned
        packed = [rows, *(faces[name] for name in order)]
        blob = np.concatenate([part.reshape(-1).view(np.uint8) for part in packed])
        device = next(self.buffers()).device
        sent = torch.from_numpy(blob).to(device)
        pieces = torch.split(sent, [part.nbytes for part in packed])
        ids = pieces[0].view(torch.int64)
        for name, face, piece in zip(order, packed[1:], pieces[1:], strict=True):
            buffer = self.get_buffer(name)
            buffer[..., ids] = piece.view(buffer.dtype).view(face.shape)

    def outdate(self, name: str) -> None:
        """The device has written a buffer: whoever needs its face next waits for a copy."""
        self._mirror.pop(name, None)

    def fetch(self, name: str) -> NDArray[Any]:
        """The face of a buffer that the device writes too, after a copy from there."""
        if self.mirrored:
            self._mirror[name] = _face(self.get_buffer(name), copied=True)
        return self.host(name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mirror": {}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.changed()
        return self


def _face(buffer: Tensor, *, copied: bool) -> NDArray[Any]:
    face: NDArray[Any] = buffer.detach().cpu().numpy()
    return face.copy() if copied else face


def _forget(module: MirroredBuffers, _: object) -> None:
    module.changed()
