"""Calls handlers: at once in the worker's own task, in a task of their own where a commit follows, or in a thread.

Whatever a handler raises is caught here, BaseException included (row D-04): asyncio would let KeyboardInterrupt and
SystemExit out of the loop, and a CancelledError that a handler raises by itself is an error like any other. Our own
cancellation is told apart by the run's phase; what neither we nor the handler asked for is the end of the process.
A thread cannot be cancelled: its switch is thrown all the same, and it keeps what it has until it returns (P28).
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from functools import partial
from typing import Any, Final

from saga.clock import Clock, Spawner
from saga.participant.served import Served
from saga.participant.switch import RUNNING, Run, Watch
from saga.participant.threads import Seat, Threads

log: Final[logging.Logger] = logging.getLogger("saga.participant")


class Ended:
    """How a handler call ended: a value or an error, and its switch."""

    __slots__ = ("error", "run", "stuck", "value")

    def __init__(
        self, run: Run, value: Any, error: BaseException | None, stuck: asyncio.Future[Any] | None
    ) -> None:
        self.run: Run = run
        self.value: Any = value
        self.error: BaseException | None = error
        self.stuck: asyncio.Future[Any] | None = stuck
        """The handler's task or thread, if it goes on although its time was over 2 s ago."""


class Calls:
    """The one place where a handler is called."""

    def __init__(self, watch: Watch, threads: Threads, *, clock: Clock, spawner: Spawner) -> None:
        self._watch = watch
        self._threads = threads
        self._clock = clock
        self._spawner = spawner

    def seat(self, served: Served) -> AbstractAsyncContextManager[Seat | None]:
        """Return the thread that a handler and its transaction need; without anything in it for an `async def`.

        It is taken before the connection, always, so that nobody who has a connection waits for a thread.
        """
        return self._threads.seat() if served.threaded else _NO_SEAT

    async def here(self, served: Served, arguments: Mapping[str, Any]) -> Ended:
        """Call a handler in this task: where no commit follows, a task for each would cost more than most handlers."""
        task = asyncio.current_task()
        assert task is not None
        run = Run(self._clock.monotonic() + served.limit_seconds, task, None)
        value, error = None, None
        self._watch.enter(run)
        try:
            value = await served.function(**arguments)
        except BaseException as raised:
            error = raised
        self._watch.leave(run)
        if run.phase is not RUNNING:
            task.uncancel()  # AIO-1: the cancellation was ours and ends here
        elif task.cancelling() and isinstance(error, asyncio.CancelledError):
            raise error
        return Ended(run, value, error, None)

    async def apart(
        self, served: Served, arguments: Mapping[str, Any], deadline: float, seat: Seat | None = None
    ) -> Ended:
        """Call a handler where cancelling it can never reach the commit that follows (P28).

        That is a task of its own, or a thread: `seat`, or one for the call alone if none is given.
        """
        if not served.threaded:
            task = self._spawner.spawn(_guarded(served.function, arguments), name="saga-handler")
            return await self._ended(served, task, task, deadline)
        if seat is not None:
            return await self._ended(
                served, seat.run(partial(_called, served.function, arguments)), None, deadline
            )
        async with self._threads.seat() as own:
            return await self.apart(served, arguments, deadline, own)

    async def _ended(
        self,
        served: Served,
        handling: asyncio.Future[tuple[Any, BaseException | None]],
        task: asyncio.Task[Any] | None,
        deadline: float,
    ) -> Ended:
        """Wait until a handler has ended, or is given up; `task` is what can be cancelled of it."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def end(*_: object) -> None:
            if not ended.done():
                ended.set_result(None)

        handling.add_done_callback(end)
        run = Run(deadline, task, end)
        self._watch.enter(run)
        try:
            await ended
        except BaseException:
            if task is not None:
                task.cancel()
            raise
        finally:
            self._watch.leave(run)
        if not handling.done():
            log.error("%s goes on although its time is over; its slot stays taken until it ends", served.name)
            return Ended(run, None, None, handling)
        value, error = (None, asyncio.CancelledError()) if handling.cancelled() else handling.result()
        return Ended(run, value, error, None)


_NO_SEAT: Final[AbstractAsyncContextManager[None]] = nullcontext()


async def _guarded(
    function: Callable[..., Awaitable[Any]], arguments: Mapping[str, Any]
) -> tuple[Any, BaseException | None]:
    try:
        return await function(**arguments), None
    except BaseException as error:
        return None, error


def _called(function: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[Any, BaseException | None]:
    """Call a plain function, in its thread. What it only promises to do would never be done."""
    try:
        value = function(**arguments)
        if inspect.isawaitable(value):
            if inspect.iscoroutine(value):
                value.close()
            raise TypeError("a `def` handler returned an awaitable; write it as `async def`")
    except BaseException as error:
        return None, error
    return value, None
