"""What a coordinator is at can be stopped, and nothing of it goes on afterwards."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from esper_ray.actors.work import Work
from esper_ray.errors import StepFailed


async def test_work_gives_its_result_and_its_own_error() -> None:
    work = Work()
    assert await work.run(asyncio.sleep(0, "done")) == "done"
    with pytest.raises(ZeroDivisionError):
        await work.in_thread(lambda: 1 // 0)


async def test_work_that_is_stopped_fails_and_a_call_in_a_thread_is_waited_for() -> None:
    work, begun, ended = Work(), threading.Event(), threading.Event()

    def store() -> None:
        begun.set()
        time.sleep(0.2)
        ended.set()

    async def boundary() -> None:
        await work.in_thread(store)
        raise AssertionError("it went on")

    asked = asyncio.ensure_future(work.run(boundary()))
    while not begun.is_set():
        await asyncio.sleep(0.01)
    await work.stop()
    assert ended.is_set()
    with pytest.raises(StepFailed, match="told to stop"):
        await asked


async def test_nothing_to_stop_is_no_error() -> None:
    await Work().stop()
