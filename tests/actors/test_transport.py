"""Mailbox and object store transport, without Ray."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable

import pytest
import torch

from esper_ray.actors.transport import (
    Mailbox,
    ObjectStoreTransport,
    Receive,
    Send,
    Tag,
    from_array,
    to_array,
)
from esper_ray.errors import RunFailed

TAG = Receive(0, Tag("forward", 3, 0))
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]


# ------------------------------------------------------------------ tensors as arrays

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t(),
    "strided": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand(5, -1),
    "one value": lambda x: x[0, 0],
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensor_arrives_bit_for_bit(dtype: torch.dtype, layout: str) -> None:
    values = torch.arange(-12, 12).view(4, 6)
    sent = LAYOUTS[layout]((values / 7 if dtype.is_floating_point else values).to(dtype))
    array, name = pickle.loads(pickle.dumps(to_array(sent)))
    array.setflags(write=False)  # as Ray hands it out
    arrived = from_array(array, name)
    assert arrived.dtype == dtype
    assert torch.equal(arrived, sent)
    arrived.zero_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_numbers_arrive_too(dtype: torch.dtype) -> None:
    sent = torch.tensor([float("nan"), float("inf"), -0.0], dtype=dtype, requires_grad=True)
    arrived = from_array(*to_array(sent))
    assert not arrived.requires_grad
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(arrived.view(bits), sent.detach().view(bits))


# ------------------------------------------------------------------ mailbox


def test_delivery_waits_until_it_is_taken_once() -> None:
    mailbox = Mailbox(timeout_s=0.01)
    mailbox.put(TAG, torch.ones(2))
    assert torch.equal(mailbox.take(TAG), torch.ones(2))
    with pytest.raises(RunFailed, match="nothing arrived as forward 0 of step 3 from actor 0"):
        mailbox.take(TAG)


def test_what_is_sent_twice_is_taken_twice_in_order() -> None:
    mailbox = Mailbox(timeout_s=1)
    mailbox.put(TAG, torch.ones(2))
    mailbox.put(TAG, torch.zeros(2))
    assert torch.equal(mailbox.take(TAG), torch.ones(2))
    assert torch.equal(mailbox.take(TAG), torch.zeros(2))


def test_other_tags_do_not_end_the_wait() -> None:
    mailbox = Mailbox(timeout_s=0.05)
    timer = threading.Timer(0.01, mailbox.put, (Receive(0, Tag("backward", 3, 0)), torch.ones(1)))
    timer.start()
    with pytest.raises(RunFailed, match="nothing arrived") as caught:
        mailbox.take(TAG)
    timer.join()
    assert "step_timeout_s" in caught.value.hint


def test_abort_wakes_a_waiting_thread_and_lasts() -> None:
    mailbox = Mailbox(timeout_s=60)
    threading.Timer(0.05, mailbox.abort, ("a neighbour failed",)).start()
    began = time.monotonic()
    with pytest.raises(RunFailed, match="step aborted: a neighbour failed"):
        mailbox.take(TAG)
    assert time.monotonic() - began < 10
    mailbox.put(TAG, torch.ones(1))
    with pytest.raises(RunFailed, match="a neighbour failed"):
        mailbox.take(TAG)


# ------------------------------------------------------------------ exchange


class Neighbour:
    """Takes one-way calls as a remote actor does: arguments are copied on the way."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.mailbox = mailbox
        self.methods: list[str] = []

    def tell(self, method: str, *args: object) -> None:
        self.methods.append(method)
        _, what, array, dtype = pickle.loads(pickle.dumps(args))
        self.mailbox.put(what, from_array(array, dtype))


def transport(mailbox: Mailbox, rank: int, peers: dict[int, Neighbour]) -> ObjectStoreTransport:
    return ObjectStoreTransport(mailbox, rank, peers, 1, torch.device("cpu"))


def test_two_actors_exchange_what_was_sent_in_the_order_asked_for() -> None:
    left, right = Mailbox(5), Mailbox(5)
    to_right = transport(left, 0, {1: Neighbour(right)})
    to_left = transport(right, 1, {0: Neighbour(left)})
    tags = [Tag("forward", 0, i) for i in range(3)]
    to_right.exchange([Send(1, tag, torch.full((2,), tag.number)) for tag in tags], [])
    received = to_left.exchange([], [Receive(0, tag) for tag in tags[::-1]])
    assert [int(x[0]) for x in received] == [2, 1, 0]
    back = Tag("backward", 0, 0)
    to_left.exchange([Send(0, back, torch.ones(1))], [])
    assert len(to_right.exchange([], [Receive(1, back)])) == 1


def test_aborted_transport_raises_on_every_later_exchange() -> None:
    there = transport(Mailbox(60), 0, {})
    there.abort("enough")
    for _ in range(2):
        with pytest.raises(RunFailed, match="enough"):
            there.exchange([], [TAG])
