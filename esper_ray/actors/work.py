"""What an asynchronous actor is at work on, so that it can be stopped for certain."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from esper_ray.errors import StepFailed

T = TypeVar("T")


class Work:
    """One task at a time, and the calls that it makes in a thread."""

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = None
        self._call: asyncio.Future[Any] | None = None

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it; StepFailed if `stop` ends it first."""
        self._task = task = asyncio.ensure_future(work)
        try:
            return await task
        except asyncio.CancelledError as error:
            raise StepFailed("step aborted: the coordinator was told to stop") from error

    async def in_thread(self, call: Callable[..., T], *args: object) -> T:
        """Call what blocks, so that others are answered meanwhile."""
        self._call = call_ = asyncio.ensure_future(asyncio.to_thread(call, *args))
        return await asyncio.shield(call_)

    async def stop(self) -> None:
        """Cancel the task and wait for its end; a thread cannot be stopped, only waited for."""
        if self._task is not None:
            self._task.cancel()
        running = [each for each in (self._task, self._call) if each is not None]
        await asyncio.gather(*running, return_exceptions=True)
        self._task = self._call = None
