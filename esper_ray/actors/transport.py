"""How activations and gradients reach the neighbouring stage."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper_ray.errors import StepFailed

Peer = Literal["previous", "next"]
Tag = tuple[str, int, int]
"""(what it is, step or request number, micro-batch)"""


class Send(NamedTuple):
    """A tensor for a neighbour."""

    peer: Peer
    tag: Tag
    tensor: Tensor


class Transport(Protocol):
    """Point-to-point exchange between neighbouring stages."""

    def exchange(self, sends: Sequence[Send], receives: Sequence[Tag]) -> list[Tensor]:
        """Send, then wait for what is named; called by compute only, in schedule order."""
        ...

    def abort(self, reason: str) -> None:
        """Make a waiting and every later `exchange` raise StepFailed; called from control."""
        ...


class Teller(Protocol):
    """Something that takes one-way calls, such as an actor handle."""

    def tell(self, method: str, *args: object) -> None:
        """Call without waiting for a result."""
        ...


class Mailbox:
    """Where a stage's incoming tensors wait; filled by one thread, emptied by another."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._arrived: dict[Tag, Tensor] = {}
        self._changed = threading.Condition()
        self._aborted: str | None = None

    def put(self, tag: Tag, tensor: Tensor) -> None:
        """Deliver; a repeated delivery replaces the first."""
        with self._changed:
            self._arrived[tag] = tensor
            self._changed.notify_all()

    def take(self, tag: Tag) -> Tensor:
        """Wait for a delivery; StepFailed after an abort or the timeout."""
        with self._changed:
            self._changed.wait_for(
                lambda: tag in self._arrived or self._aborted is not None, self._timeout_s
            )
            if self._aborted is not None:
                raise StepFailed(f"step aborted: {self._aborted}")
            if tag not in self._arrived:
                raise StepFailed(
                    f"nothing arrived as {tag} within {self._timeout_s:.0f} s",
                    "raise cluster.step_timeout_s if a step may take longer",
                )
            return self._arrived.pop(tag)

    def abort(self, reason: str) -> None:
        """Wake the waiting thread with an error, for good."""
        with self._changed:
            self._aborted = reason
            self._changed.notify_all()


class ObjectStoreTransport:
    """One-way `deliver` calls between actors; large arguments pass through Ray's object store.

    Correct on every device and cluster, and the slowest of the transports.
    """

    def __init__(self, mailbox: Mailbox, peers: Mapping[Peer, Teller]) -> None:
        self._mailbox, self._peers = mailbox, peers

    def exchange(self, sends: Sequence[Send], receives: Sequence[Tag]) -> list[Tensor]:
        """Send without waiting, then wait for `receives`, in their order."""
        for send in sends:
            self._peers[send.peer].tell("deliver", send.tag, *to_array(send.tensor))
        return [self._mailbox.take(tag) for tag in receives]

    def abort(self, reason: str) -> None:
        """See Transport."""
        self._mailbox.abort(reason)


def to_array(tensor: Tensor) -> tuple[NDArray[np.generic], str]:
    """The tensor's bytes as an array that Ray passes without pickling them, and its dtype."""
    plain = tensor.detach().cpu().contiguous()
    name = str(plain.dtype).removeprefix("torch.")
    return (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy(), name


def from_array(array: NDArray[np.generic], dtype: str) -> Tensor:
    """The inverse of `to_array`; copies, since arrays from the object store are read-only."""
    tensor = torch.from_numpy(array.copy())
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
