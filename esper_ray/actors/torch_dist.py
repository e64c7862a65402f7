"""Tensors from device to device, by a process group of the actors: gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from esper_ray.actors.transport import Receive, Send, Tag, aborted
from esper_ray.errors import StepFailed, first_line

_FAULTS: Final = (RuntimeError, ValueError)  # what torch.distributed raises, DistError included
_POISON: Final = 1
_POLL_S: Final = 0.0005


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the actors of a run epoch meet, and how many they are."""

    host: str
    port: int
    world: int
    run_epoch: int


class Rendezvous:
    """The store that rank 0 keeps for a group; it listens on its node's cluster address alone."""

    def __init__(self, host: str, world: int, run_epoch: int, timeout_s: float) -> None:
        listener = socket.create_server((host, 0))
        self.meeting = Meeting(host, listener.getsockname()[1], world, run_epoch)
        self.store: Any = dist.TCPStore(  # type: ignore[attr-defined]
            host,
            self.meeting.port,
            world,
            is_master=True,
            timeout=datetime.timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )


class TorchDistTransport:
    """The process group of one run epoch, which is never used again after a failure.

    Neither backend tells a receiver what comes: order does, and the shape of a steady kind is asked
    from the store once, that of any other each time. A reply is shaped as what it answers, so that
    nobody waits for a shape that depends on what is to be sent with it. One per process.
    """

    def __init__(
        self,
        meeting: Meeting,
        rank: int,
        device: torch.device,
        timeout_s: float,
        own: Rendezvous | None = None,
    ) -> None:
        leave_group()
        self._rank, self._device = rank, device
        self._limit = datetime.timedelta(seconds=timeout_s)
        self._aborted: str | None = None
        self._lock = threading.Lock()
        self._shapes: dict[tuple[int, int, str], tuple[torch.Size, torch.dtype]] = {}
        self._sending: list[tuple[dist.Work, Tensor]] = []
        store = own.store if own is not None else _reach(meeting, self._limit)
        self._store: Any = dist.PrefixStore(  # type: ignore[attr-defined]
            f"esper/{meeting.run_epoch}", store
        )
        _bind(meeting.host)
        cuda = device.type == "cuda"
        # NCCL's watchdog would end the process of an exchange that fails; the run goes on instead.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
        try:
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=self._store,
                rank=rank,
                world_size=meeting.world,
                timeout=self._limit,
                device_id=device if cuda else None,
            )
        except _FAULTS as error:
            raise StepFailed(f"no process group of {meeting.world} actors: {error}") from error

    def exchange(self, sends: Sequence[Send], receives: Sequence[Receive]) -> list[Tensor]:
        """See Transport. On a GPU the caller's stream waits, not the caller."""
        if self._aborted is not None:
            raise aborted(self._aborted)
        if not sends and not receives:
            return []
        try:
            return self._exchange(sends, receives)
        except _FAULTS as error:
            leave_group()  # what others wait for will not come: closed connections tell them
            if self._aborted is not None:
                raise aborted(self._aborted) from error
            raise StepFailed(f"the exchange of tensors failed: {first_line(error)}") from error

    def _exchange(self, sends: Sequence[Send], receives: Sequence[Receive]) -> list[Tensor]:
        given = [send.tensor.detach().contiguous() for send in sends]
        for send, tensor in zip(sends, given, strict=True):
            self._tell_shape(send, tensor)
        taken = [self._room(what) for what in receives]
        # All of a turn in one batch: single calls in opposite order on two sides can block NCCL.
        ops = [
            dist.P2POp(dist.isend, tensor, send.rank)
            for send, tensor in zip(sends, given, strict=True)
        ]
        ops += [
            dist.P2POp(dist.irecv, room, what.rank)
            for what, room in zip(receives, taken, strict=True)
        ]
        works = dist.batch_isend_irecv(ops)
        if self._device.type == "cuda":  # one work stands for the batch
            for work in works:
                work.wait()
            return taken
        for work, _ in self._sending:
            work.wait()
        self._sending = list(zip(works, given, strict=False))
        for work in works[len(sends) :]:
            work.wait()
        return taken

    def abort(self, reason: str) -> None:
        """See Transport; called from another thread than `exchange`."""
        with self._lock:
            if self._aborted is not None or not dist.is_initialized():
                return
            self._aborted = reason
        with contextlib.suppress(*_FAULTS):
            if self._device.type == "cuda":
                dist.group.WORLD.abort()  # type: ignore[union-attr]
                return
            # gloo closes every connection of a group when one wait is too long, so one is made.
            peer = (self._rank + 1) % dist.get_world_size()
            never = dist.irecv(torch.empty(1), peer, tag=_POISON)
            if never is not None:
                never.wait(datetime.timedelta(milliseconds=1))

    def close(self) -> None:
        """See Transport."""
        self._sending.clear()
        leave_group()

    # ---- shapes ------------------------------------------------------------------------------

    def _tell_shape(self, send: Send, tensor: Tensor) -> None:
        key = (self._rank, send.rank, send.tag.kind)
        shape = (tensor.shape, tensor.dtype)
        if send.tag.reply:
            self._shapes[send.rank, self._rank, send.tag.reply] = shape
        if send.tag.steady:
            known = self._shapes.get(key)
            if known == shape:
                return
            if known is not None:
                raise StepFailed(f"{send.tag.kind} changed its shape from {known[0]} to {shape[0]}")
            self._shapes[key] = shape
        words = [str(tensor.dtype).removeprefix("torch."), *map(str, tensor.shape)]
        self._store.set(_name(self._rank, send.rank, send.tag), ",".join(words))

    def _room(self, what: Receive) -> Tensor:
        key = (what.rank, self._rank, what.tag.kind)
        known = self._shapes.get(key) if what.tag.steady else None
        if known is None:
            known = self._asked(_name(what.rank, self._rank, what.tag))
            if what.tag.steady:
                self._shapes[key] = known
        shape, dtype = known
        return torch.empty(shape, dtype=dtype, device=self._device)

    def _asked(self, name: str) -> tuple[torch.Size, torch.dtype]:
        until = time.monotonic() + self._limit.total_seconds()
        while not self._store.check([name]):  # not `get`, whose wait nobody could end
            if self._aborted is not None:
                raise aborted(self._aborted)
            if time.monotonic() > until:
                raise RuntimeError(f"nobody said the shape of {name!r} in time")
            time.sleep(_POLL_S)
        dtype, *shape = self._store.get(name).decode().split(",")
        return torch.Size(map(int, shape)), getattr(torch, dtype)


def leave_group() -> None:
    """End this process's group, if it has one; what waits in it fails, here and elsewhere."""
    if dist.is_initialized():
        with contextlib.suppress(*_FAULTS):
            dist.destroy_process_group()


def _reach(meeting: Meeting, limit: datetime.timedelta) -> Any:
    try:
        return dist.TCPStore(  # type: ignore[attr-defined]
            meeting.host, meeting.port, meeting.world, is_master=False, timeout=limit
        )
    except _FAULTS as error:
        raise StepFailed(f"no store of the run at {meeting.host}: {first_line(error)}") from error


def _name(source: int, target: int, tag: Tag) -> str:
    name = f"{source}>{target} {tag.kind}"
    return name if tag.steady else f"{name} {tag.step} {tag.number}"


def _bind(host: str) -> None:
    """Have both backends use the network of the node's cluster address."""
    import psutil  # Ray brings it, and makes it importable

    own = _own_address(host)
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == own for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def _own_address(host: str) -> str:
    """This node's address on the way to `host`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return str(probe.getsockname()[0])
