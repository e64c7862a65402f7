"""How tensors reach other actors."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper_ray.errors import StepFailed


class Tag(NamedTuple):
    """What a tensor is: of a kind and number; those of a `steady` kind are all of one shape.

    It is answered by one of the same shape, of kind `reply`, if there is any.
    """

    kind: str
    step: int
    number: int
    steady: bool = True
    reply: str = ""


class Send(NamedTuple):
    """A tensor for the actor `rank`."""

    rank: int
    tag: Tag
    tensor: Tensor


class Receive(NamedTuple):
    """A tensor that the actor `rank` sends."""

    rank: int
    tag: Tag


class Transport(Protocol):
    """Point-to-point exchange between actors, by rank.

    What one sends to another is received in the same order, and both sides call in that order.
    """

    def exchange(self, sends: Sequence[Send], receives: Sequence[Receive]) -> list[Tensor]:
        """Send, then wait for what is named; called by compute only, in schedule order."""
        ...

    def abort(self, reason: str) -> None:
        """Make a waiting and every later `exchange` raise StepFailed; called from control."""
        ...

    def close(self) -> None:
        """Free what it holds; not usable afterwards."""
        ...


class Teller(Protocol):
    """Something that takes one-way calls, such as an actor handle."""

    def tell(self, method: str, *args: object) -> None:
        """Call without waiting for a result."""
        ...


class Mailbox:
    """Where an actor's incoming tensors wait; filled by one thread, emptied by another."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._arrived: dict[Receive, deque[Tensor]] = defaultdict(deque)
        self._changed = threading.Condition()
        self._aborted: str | None = None

    def put(self, what: Receive, tensor: Tensor) -> None:
        """Deliver; what comes twice is taken twice."""
        with self._changed:
            self._arrived[what].append(tensor)
            self._changed.notify_all()

    def take(self, what: Receive) -> Tensor:
        """Wait for a delivery; StepFailed after an abort or the timeout."""
        with self._changed:
            self._changed.wait_for(
                lambda: what in self._arrived or self._aborted is not None, self.timeout_s
            )
            if self._aborted is not None:
                raise aborted(self._aborted)
            if what not in self._arrived:
                raise late(what, self.timeout_s)
            waiting = self._arrived[what]
            tensor = waiting.popleft()
            if not waiting:
                del self._arrived[what]
            return tensor

    def abort(self, reason: str) -> None:
        """Wake the waiting thread with an error, for good."""
        with self._changed:
            self._aborted = reason
            self._changed.notify_all()


def aborted(reason: str) -> StepFailed:
    """The error of a step that another thread ended."""
    return StepFailed(f"step aborted: {reason}")


def late(what: Receive, waited_s: float) -> StepFailed:
    """The error of a tensor that did not come in time."""
    return StepFailed(
        f"nothing arrived as {what.tag.kind} {what.tag.number} of step {what.tag.step} from actor "
        f"{what.rank} within {waited_s:.0f} s",
        "raise cluster.step_timeout_s if a step may take longer",
    )


class ObjectStoreTransport:
    """One-way `deliver` calls between actors; large arguments pass through Ray's object store.

    Correct on every device and cluster, and the slowest of the transports. Each message names the
    run epoch, so that those of an actor that lives on after it was given up are not taken.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        rank: int,
        peers: Mapping[int, Teller],
        run_epoch: int,
        device: torch.device,
    ) -> None:
        self._mailbox, self._rank, self._peers = mailbox, rank, peers
        self._run_epoch, self._device = run_epoch, device

    def exchange(self, sends: Sequence[Send], receives: Sequence[Receive]) -> list[Tensor]:
        """Send without waiting, then wait for `receives`, in their order."""
        for send in sends:
            array, dtype = to_array(send.tensor)
            what = Receive(self._rank, send.tag)
            self._peers[send.rank].tell("deliver", self._run_epoch, what, array, dtype)
        return [self._mailbox.take(what).to(self._device) for what in receives]

    def abort(self, reason: str) -> None:
        """See Transport."""
        self._mailbox.abort(reason)

    def close(self) -> None:
        """Nothing is held but the mailbox, which its actor drops."""


def to_array(tensor: Tensor) -> tuple[NDArray[np.generic], str]:
    """The tensor's bytes as an array that Ray passes without pickling them, and its dtype."""
    plain = tensor.detach().cpu().contiguous()
    name = str(plain.dtype).removeprefix("torch.")
    return (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy(), name


def from_array(array: NDArray[np.generic], dtype: str) -> Tensor:
    """The inverse of `to_array`; copies, since arrays from the object store are read-only."""
    tensor = torch.from_numpy(array.copy())
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
