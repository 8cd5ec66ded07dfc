"""Calls handlers: at once in the worker's own task, or in a task of their own where a commit follows.

Whatever a handler raises is caught here, BaseException included (row D-04): asyncio would let KeyboardInterrupt and
SystemExit out of the loop, and a CancelledError that a handler raises by itself is an error like any other. Our own
cancellation is told apart by the run's phase; what neither we nor the handler asked for is the end of the process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from saga.clock import Clock, Spawner
from saga.participant.served import Served
from saga.participant.switch import RUNNING, Run, Watch

log: Final[logging.Logger] = logging.getLogger("saga.participant")


class Ended:
    """How a handler call ended: a value or an error, and its switch."""

    __slots__ = ("error", "run", "stuck", "value")

    def __init__(
        self, run: Run, value: Any, error: BaseException | None, stuck: asyncio.Task[Any] | None
    ) -> None:
        self.run: Run = run
        self.value: Any = value
        self.error: BaseException | None = error
        self.stuck: asyncio.Task[Any] | None = stuck
        """The handler's task, if it goes on although it was cancelled 2 s ago."""


class Calls:
    """The one place where a handler is called."""

    def __init__(self, watch: Watch, *, clock: Clock, spawner: Spawner) -> None:
        self._watch = watch
        self._clock = clock
        self._spawner = spawner

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

    async def apart(self, served: Served, arguments: Mapping[str, Any], deadline: float) -> Ended:
        """Call a handler in a task of its own, so that cancelling it can never reach the commit that follows (P28)."""
        task = self._spawner.spawn(_guarded(served.function, arguments), name="saga-handler")
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def end(*_: object) -> None:
            if not ended.done():
                ended.set_result(None)

        task.add_done_callback(end)
        run = Run(deadline, task, end)
        self._watch.enter(run)
        try:
            await ended
        except BaseException:
            task.cancel()
            raise
        finally:
            self._watch.leave(run)
        if not task.done():
            log.error("%s goes on although it was cancelled; its slot stays taken until it ends", served.name)
            return Ended(run, None, None, task)
        value, error = (None, asyncio.CancelledError()) if task.cancelled() else task.result()
        return Ended(run, value, error, None)


async def _guarded(
    function: Callable[..., Awaitable[Any]], arguments: Mapping[str, Any]
) -> tuple[Any, BaseException | None]:
    try:
        return await function(**arguments), None
    except BaseException as error:
        return None, error
