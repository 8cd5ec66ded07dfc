"""Where a handler's transaction runs: on the loop with an AsyncSession, or in the handler's thread with a Session.

What is done to the session, flush, barrier row, COMMIT and rollback, are the same functions for both; they work on the
synchronous session, which an AsyncSession has inside.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, Protocol, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from saga.storage.base import Thread
from saga.storage.sqlalchemy.database import Database, tell
from saga.storage.sqlalchemy.handlersession import HandlerSession, ThreadSession, cut, discard

T = TypeVar("T")
END_SECONDS: Final = 5.0
log: Final[logging.Logger] = logging.getLogger("saga.participant")


class Way(Protocol):
    """Where a transaction's functions run, and what is taken and given back for it."""

    session: Session
    """What they work on."""
    permits: asyncio.Semaphore
    keeps_permit: bool
    """Whether `end` gives the permit back by itself, when the connection is back."""

    @property
    def given(self) -> AsyncSession | Session:
        """What the handler gets of it."""
        ...

    def run(self, function: Callable[[], T]) -> Awaitable[T]:
        """Run a function; with its waiter cancelled it may go on."""
        ...

    async def end(self, handler: str, *, given_up: bool) -> None:
        """Roll back, bounded. `given_up`: the handler goes on, and may be using the session."""
        ...


class OnLoop:
    """In SQLAlchemy's greenlet, on the asynchronous driver."""

    keeps_permit = False

    def __init__(self, database: Database, permits: asyncio.Semaphore) -> None:
        self._database = database
        self.permits = permits
        self._session = HandlerSession(
            database.engine, clock=None if database.writer is None else database.clock
        )
        self.session: Session = self._session.sync_session

    @property
    def given(self) -> AsyncSession:
        return self._session

    def run(self, function: Callable[[], T]) -> Awaitable[T]:
        return greenlet_spawn(function)

    async def end(self, handler: str, *, given_up: bool) -> None:
        if not given_up and await self._ended(discard):
            return
        if not given_up:
            log.info("the transaction of %s could not be rolled back; its connection is cut", handler)
        await self._ended(cut)

    async def _ended(self, how: Callable[[Session], None]) -> bool:
        task = self._database.spawner.spawn(greenlet_spawn(how, self.session), name="saga-handler-rollback")
        done, _ = await asyncio.wait({task}, timeout=END_SECONDS)
        return bool(done) and not task.cancelled() and task.exception() is None


class InThread:
    """In the handler's own thread, on a synchronous driver, so that nothing touches the session before it returns."""

    keeps_permit = True

    def __init__(
        self, database: Database, connections: int, permits: asyncio.Semaphore, thread: Thread
    ) -> None:
        self._database = database
        self.permits = permits
        self._thread = thread
        self.session: Session = ThreadSession(database.serve_threads(connections), clock=database.clock)

    @property
    def given(self) -> Session:
        return self.session

    def run(self, function: Callable[[], T]) -> Awaitable[T]:
        # a task of the database's: what was sent to it goes on, whoever stops waiting (SQL-2)
        ended: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        running = self._thread.run(function)
        self._database.spawner.spawn(tell(lambda: running, ended), name="saga-handler-thread")
        return ended

    async def end(self, handler: str, *, given_up: bool) -> None:
        def end() -> None:
            try:
                discard(self.session)
            except Exception:
                log.info("the transaction of %s could not be rolled back; its connection is cut", handler)
                cut(self.session)

        running = self._thread.run(end)
        task = self._database.spawner.spawn(self._ended(running), name="saga-handler-rollback")
        task.add_done_callback(lambda _: self.permits.release())
        await asyncio.wait({task}, timeout=0 if given_up else END_SECONDS)

    async def _ended(self, running: Awaitable[None]) -> None:
        await running
