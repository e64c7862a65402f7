"""A process group of actors: what is exchanged, and how a wait in it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from esper_ray.actors.torch_dist import Rendezvous, TorchDistTransport
from esper_ray.actors.transport import Receive, Send, Tag
from esper_ray.errors import StepFailed

WORLD, TIMEOUT_S = 3, 20.0
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ray", "tests.actors.test_torch_dist"])

Part = Callable[[TorchDistTransport, int], Any]


def gather(transport: TorchDistTransport, rank: int) -> list[list[float]]:
    """Everybody sends to everybody, twice in one shape and then in others."""
    others = [other for other in range(WORLD) if other != rank]
    found = []
    for number, (kind, size) in enumerate([("a", 4), ("a", 4), ("b", 2), ("b", 7)]):
        tag = Tag(kind, 0, number, steady=kind == "a")
        own = torch.full((size,), float(10 * rank + number), dtype=torch.bfloat16)
        got = transport.exchange(
            [Send(other, tag, own) for other in others], [Receive(other, tag) for other in others]
        )
        assert all(x.shape == (size,) and x.dtype == torch.bfloat16 for x in got)
        found.append([float(x[0]) for x in got])
    transport.exchange([Send(o, Tag("end", 0, 0), own) for o in others], [])
    return found


def answer(transport: TorchDistTransport, rank: int) -> list[float]:
    """A reply is awaited together with what it answers, and nobody says its shape."""
    there, back = Tag("there", 0, 0, reply="back"), Tag("back", 0, 0)
    if rank == 0:
        sent = torch.arange(6.0).view(2, 3)
        [reply] = transport.exchange([Send(1, there, sent)], [Receive(1, back)])
        return [float(reply.sum())]
    if rank == 1:
        [x] = transport.exchange([], [Receive(0, there)])
        transport.exchange([Send(0, back, x * 2)], [])
    return []


def wait_for_nobody(transport: TorchDistTransport, rank: int) -> tuple[str, float]:
    """Everybody waits for what the one before never sends."""
    began = time.monotonic()
    try:
        transport.exchange([Send((rank + 1) % WORLD, Tag("x", 0, 0), torch.ones(1))], [])
        transport.exchange([], [Receive((rank - 1) % WORLD, Tag("x", 0, 0))])
        transport.exchange([], [Receive((rank - 1) % WORLD, Tag("x", 0, 1))])
    except StepFailed as error:
        return error.message, time.monotonic() - began
    return "", 0.0


def aborted_by_the_first(transport: TorchDistTransport, rank: int) -> tuple[str, float]:
    if rank == 0:
        threading.Timer(0.5, transport.abort, ["a neighbour is lost"]).start()
    return wait_for_nobody(transport, rank)


def killed_is_the_second(transport: TorchDistTransport, rank: int) -> tuple[str, float]:
    if rank == 1:
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGKILL]).start()
    return wait_for_nobody(transport, rank)


def _work(there: Connection, rank: int, part: Part) -> None:
    torch.set_num_threads(1)
    own = Rendezvous("127.0.0.1", WORLD, 1, TIMEOUT_S) if rank == 0 else None
    there.send(None if own is None else own.meeting)
    transport = TorchDistTransport(there.recv(), rank, torch.device("cpu"), TIMEOUT_S, own)
    there.send(part(transport, rank))
    there.recv()  # until all have answered
    transport.close()


@pytest.fixture
def run() -> Iterator[Callable[[Part], list[Any]]]:
    """Runs a part on every rank; what each answers, None from one that died."""
    processes = []

    def start(part: Part) -> list[Any]:
        pipes = [CONTEXT.Pipe() for _ in range(WORLD)]
        for rank, (_, there) in enumerate(pipes):
            process = CONTEXT.Process(target=_work, args=(there, rank, part), daemon=True)
            process.start()
            processes.append(process)
            there.close()
        here = [pipe for pipe, _ in pipes]
        [meeting, *_] = [pipe.recv() for pipe in here]
        for pipe in here:
            pipe.send(meeting)
        answers = []
        for pipe in here:
            try:
                answers.append(pipe.recv())
            except EOFError:
                answers.append(None)
        return answers

    yield start
    for process in processes:
        process.kill()
        process.join()


def test_what_is_sent_arrives_in_order_whatever_its_shape(
    run: Callable[[Part], list[Any]],
) -> None:
    expected = [
        [[10.0 * other + number for other in range(WORLD) if other != rank] for number in range(4)]
        for rank in range(WORLD)
    ]
    assert run(gather) == expected


def test_a_reply_is_shaped_as_what_it_answers(run: Callable[[Part], list[Any]]) -> None:
    assert run(answer) == [[30.0], [], []]


def test_an_abort_ends_the_wait_of_all_in_seconds(run: Callable[[Part], list[Any]]) -> None:
    told = run(aborted_by_the_first)
    assert told[0][0] == "step aborted: a neighbour is lost"
    assert all(message and waited_s < TIMEOUT_S / 2 for message, waited_s in told)


def test_a_death_ends_the_wait_of_all_in_seconds(run: Callable[[Part], list[Any]]) -> None:
    told = run(killed_is_the_second)
    assert told[1] is None
    for message, waited_s in (told[0], told[2]):
        assert "the exchange of tensors failed" in message
        assert waited_s < TIMEOUT_S / 2
