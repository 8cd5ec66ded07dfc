"""Threads for plain `def` handlers: at most 32, one to each command until everything of it has ended there.

A command keeps its thread from before the handler to after COMMIT and gives it back only when nothing runs in it any
more, so whatever is asked of it later, such as a rollback, begins after the handler has returned. If its transaction
took any free thread instead, handlers that wait for SQLite's writer could take all of them from the one that holds it.
The threads are daemons of our own, because the interpreter's exit waits for those of `concurrent.futures`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, Final, TypeVar

T = TypeVar("T")
THREADS_MAX: Final = 32

Jobs = SimpleQueue[Callable[[], None] | None]


class Threads:
    """The threads of one participant, made when they are first wanted. Used from one loop."""

    def __init__(self, threads_max: int = THREADS_MAX) -> None:
        self._free = asyncio.Semaphore(threads_max)
        self._idle: list[Jobs] = []
        self._closed = False
        self.taken: int = 0
        """How many of them some command has."""

    def seat(self) -> Seat:
        """Return a thread to be taken by `async with`: first come, first served."""
        return Seat(self)

    async def take(self) -> Jobs:
        """Wait for a free thread and return what feeds it."""
        await self._free.acquire()
        self.taken += 1
        if self._idle:
            return self._idle.pop()
        jobs: Jobs = SimpleQueue()
        Thread(target=_work, args=(jobs,), name="saga-handler", daemon=True).start()
        return jobs

    def give_back(self, jobs: Jobs) -> None:
        """Let the next one have a thread in which nothing runs."""
        if self._closed:
            jobs.put(None)
        else:
            self._idle.append(jobs)
        self.taken -= 1
        self._free.release()

    def close(self) -> None:
        """End the threads that are free, and each of the others when what runs in it has returned."""
        self._closed = True
        while self._idle:
            self._idle.pop().put(None)


class Seat:
    """One thread for one command. What it is given runs one after the other, in the order given."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._loop = asyncio.get_running_loop()
        self._jobs: Jobs = SimpleQueue()
        self._unfinished = 0
        self._left = False

    async def __aenter__(self) -> Seat:
        self._jobs = await self._threads.take()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left = True
        self._end()

    def run(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Run a function in the thread, with the caller's context variables; the result is for whoever still waits.

        Nothing cancels it: a cancelled future means that nobody waits.
        """
        ended: asyncio.Future[T] = self._loop.create_future()
        context = copy_context()

        def job() -> None:
            try:
                result = context.run(function)
            except BaseException as error:
                self._post(ended, error, None)
            else:
                self._post(ended, None, result)

        self._unfinished += 1
        self._jobs.put(job)
        return ended

    def _post(self, ended: asyncio.Future[T], error: BaseException | None, result: T | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits for anything any more
            self._loop.call_soon_threadsafe(self._finished, ended, error, result)

    def _finished(self, ended: asyncio.Future[Any], error: BaseException | None, result: Any) -> None:
        self._unfinished -= 1
        if not ended.done():
            if error is None:
                ended.set_result(result)
            else:
                ended.set_exception(error)
        self._end()

    def _end(self) -> None:
        if self._left and not self._unfinished:
            self._threads.give_back(self._jobs)


def _work(jobs: Jobs) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # it holds the handler's arguments
