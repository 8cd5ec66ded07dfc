"""The ports Clock, Ids and Spawner with their real adapters: the only place that asks for time, randomness or tasks.

Everything above runs unchanged on a virtual clock and a seeded id source, so a simulation can own them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any, Final, Protocol, TypeVar
from uuid import UUID

from saga.uuids import uuid_of

T = TypeVar("T")
log: Final[logging.Logger] = logging.getLogger("saga.tasks")


class Clock(Protocol):
    """Local time: monotonic for waits, wall time for logs and for SQLite, whose host is its clock (P10)."""

    def monotonic(self) -> float:
        """Return seconds that never go backwards."""
        ...

    def now(self) -> datetime:
        """Return the aware UTC wall time."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait; cancelling is safe."""
        ...


class Ids(Protocol):
    """Source of ids and of jitter."""

    def uuid7(self) -> UUID:
        """Return a new UUIDv7: unique, ordered by creation time to the millisecond."""
        ...

    def fraction(self) -> float:
        """Return a uniform number in [0, 1) for jitter of in-process retries."""
        ...


class Spawner(Protocol):
    """Owner of background tasks: keeps each one referenced until it ends and reports how it ended (AIO-6)."""

    def spawn(self, coroutine: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
        """Start a task that outlives its caller's cancellation."""
        ...


class SystemClock:
    """The real clock."""

    def monotonic(self) -> float:
        return time.monotonic()

    def now(self) -> datetime:
        return datetime.now(UTC)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class SystemIds:
    """UUIDv7 (RFC 9562) from the wall clock, or that of `clock`, and the system's random source."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._now_ns: Callable[[], int] = (
            time.time_ns if clock is None else lambda: int(clock.now().timestamp() * 1e9)
        )

    def uuid7(self) -> UUID:
        raw = bytearray((self._now_ns() // 1_000_000).to_bytes(6, "big") + os.urandom(10))
        raw[6] = raw[6] & 0x0F | 0x70
        raw[8] = raw[8] & 0x3F | 0x80
        return uuid_of(bytes(raw))

    def fraction(self) -> float:
        return int.from_bytes(os.urandom(7), "big") / (1 << 56)


class TaskSpawner:
    """Keeps its tasks in starting order; `close` cancels them and waits, bounded."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[Any], None] = {}

    def spawn(self, coroutine: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks[task] = None
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and task.exception() is not None:
            # the class only: an exception's text may hold payload
            log.error("background task %s ended with %s", task.get_name(), type(task.exception()).__name__)

    async def close(self, *, seconds: float = 10.0) -> None:
        """Cancel what still runs, in starting order, and wait up to `seconds` for it to end."""
        pending = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.wait(pending, timeout=seconds)


async def woken(event: asyncio.Event, seconds: float, *, clock: Clock, spawner: Spawner, name: str) -> None:
    """Wait until `event` is set, at the latest in so many seconds; it is set afterwards. Cancelling is safe."""

    async def ring() -> None:
        await clock.sleep(seconds)
        event.set()

    timer = spawner.spawn(ring(), name=name)
    try:
        await event.wait()
    finally:
        timer.cancel()


async def within(seconds: float, coroutine: Coroutine[Any, Any, T], *, spawner: Spawner, name: str) -> T:
    """Await `coroutine` for at most `seconds`, then raise TimeoutError and leave it to the spawner.

    A hard bound: unlike `wait_for` it does not wait for the cancelled inner task (AIO-2), and what it runs
    is not cancelled with the caller, because a cancelled driver call says nothing about its outcome (SQL-2).
    """
    task = spawner.spawn(coroutine, name=name)
    done, _ = await asyncio.wait({task}, timeout=seconds)
    if not done:
        raise TimeoutError(name)
    return task.result()
