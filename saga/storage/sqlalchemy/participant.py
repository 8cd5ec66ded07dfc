"""The participant's store over SQLAlchemy: handlers' transactions, and the barrier's own (row D-10).

A handler's transaction begins at its first statement and holds one connection; there are never more of them than
the pool has connections, so nobody waits in the pool, and nothing here asks for a second one (SQL-7). Flush, barrier
insert, COMMIT and giving the connection back are one switch into SQLAlchemy's greenlet.

For a handler in a thread the same functions run in that thread, on a session of a synchronous driver. Those sessions
have connections and permits of their own: a thread that never returns keeps both, and the look that precedes the answer
(P22) must not wait for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextvars import Token
from copy import copy
from typing import Any, Final, NoReturn, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from saga.errors import StorageBusy, StorageUnavailable
from saga.failpoints import failpoint
from saga.storage.base import BUSY, LOST, OTHER, BarrierKey, BarrierRow, Thread
from saga.storage.sqlalchemy.barrier import CANCELLED, BarrierStatements, statements
from saga.storage.sqlalchemy.database import Database
from saga.storage.sqlalchemy.failures import Failure, classify, describe
from saga.storage.sqlalchemy.handlersession import began, commit, flushed
from saga.storage.sqlalchemy.handlerway import InThread, OnLoop, Way
from saga.storage.sqlalchemy.inbox import InboxStatements
from saga.storage.sqlalchemy.writer import HOLDING_SECONDS_MAX, handler_writes_to

T = TypeVar("T")
log: Final[logging.Logger] = logging.getLogger("saga.participant")


class SqlParticipantStore:
    """One participant's barrier in its own database."""

    def __init__(self, database: Database, namespace: str, *, transactions_max: int | None = None) -> None:
        """`transactions_max` bounds the connections used here; by default all of the pool's.

        Handlers in threads have as many once more, of another driver.
        """
        self.database = database
        self._namespace = namespace
        self._statements: BarrierStatements = statements(database.dialect, namespace, database.clock)
        self._max = transactions_max or _pool_size(database)
        self._permits = asyncio.Semaphore(self._max)
        self._thread_permits = asyncio.Semaphore(self._max)

    def inbox(self) -> SqlParticipantStore:
        """Return the same store for plain events: the inbox in the barrier's place, its connections shared."""
        store = copy(self)
        store._statements = InboxStatements(self.database, self._namespace, self._statements)
        return store

    @property
    def transactions_max(self) -> int:
        return self._max

    def serve_threads(self) -> None:
        self.database.serve_threads(self._max)

    def transaction(self, handler: str, thread: Thread | None = None) -> SqlHandlerTransaction:
        way: Way
        if thread is None:
            way = OnLoop(self.database, self._permits)
        else:
            way = InThread(self.database, self._max, self._thread_permits, thread)
        return SqlHandlerTransaction(self.database, self._statements, way, handler)

    def trouble(self, error: BaseException) -> str:
        if isinstance(error, StorageBusy | PoolTimeout):
            return BUSY
        if isinstance(error, StorageUnavailable):
            return LOST
        if not isinstance(error, DBAPIError):
            return OTHER  # a TimeoutError or ConnectionError of the handler's own is an error like any other
        return {Failure.BUSY: BUSY, Failure.LOST: LOST, Failure.FATAL: OTHER}[classify(error)]

    async def look_up(self, keys: Sequence[BarrierKey]) -> Mapping[BarrierKey, BarrierRow]:
        # on SQLite a handler that does not let go of the writer must not keep anybody from being answered
        return await self._run(
            lambda connection: self._statements.select(connection, keys), single=True, reads=True
        )

    async def decide(self, rows: Sequence[BarrierRow]) -> Mapping[BarrierKey, BarrierRow]:
        def decide(connection: Connection) -> dict[BarrierKey, BarrierRow]:
            self._statements.insert(connection, sorted(rows))
            return self._statements.select(connection, [row.key for row in rows])

        return await self._run(decide)

    async def replace(self, row: BarrierRow, was: str) -> BarrierRow:
        def replace(connection: Connection) -> BarrierRow:
            self._statements.replace(connection, row, was)
            return self._statements.select(connection, [row.key])[row.key]

        return await self._run(replace)

    async def count_lone_run(self, command_id: str) -> int:
        return await self._run(
            lambda connection: self._statements.count_lone_run(connection, command_id), single=True
        )

    async def forget_lone_run(self, command_id: str) -> None:
        await self._run(
            lambda connection: self._statements.forget_lone_run(connection, command_id), single=True
        )

    async def _run(
        self, function: Callable[[Connection], T], *, single: bool = False, reads: bool = False
    ) -> T:
        async with self._permits:
            return await self.database.run(function, single=single, reads=reads)


class SqlHandlerTransaction:
    """One transaction around a handler. `async with` takes a connection's permit and gives it back."""

    def __init__(self, database: Database, barrier: BarrierStatements, way: Way, handler: str) -> None:
        self._database = database
        self._barrier = barrier
        self._way = way
        self._handler = handler
        self._sqlite = database.writer is not None
        self._session = way.session
        self._permitted = True
        self._token: Token[str | None] | None = None
        self._open = True

    @property
    def session(self) -> AsyncSession | Session:
        return self._way.given

    async def __aenter__(self) -> SqlHandlerTransaction:
        await self._way.permits.acquire()
        if self._sqlite:
            self._token = handler_writes_to.set(self._database.url.database)
        return self

    async def __aexit__(self, *exc: object) -> None:
        try:
            if self._open:
                await self._end(given_up=False)
        finally:
            if self._token is not None:
                handler_writes_to.reset(self._token)
            if self._sqlite:
                self._report_holding()
            if self._permitted:
                self._way.permits.release()

    async def find(self, keys: Sequence[BarrierKey]) -> Mapping[BarrierKey, BarrierRow]:
        return await self._statement(lambda connection: self._barrier.select(connection, keys))

    async def cancel(
        self, forward: Sequence[BarrierKey], also: Sequence[BarrierKey]
    ) -> Mapping[BarrierKey, BarrierRow]:
        def cancel(connection: Connection) -> dict[BarrierKey, BarrierRow]:
            won = self._barrier.insert(connection, [BarrierRow(key, CANCELLED, None) for key in forward])
            # READ COMMITTED: this second statement sees the rows that made the first one insert nothing
            rows = self._barrier.select(connection, [*forward, *also])
            return {key: row for key, row in rows.items() if key not in won}

        return await self._statement(cancel)

    async def commit(self, rows: Sequence[BarrierRow]) -> frozenset[BarrierKey]:
        try:
            taken = await self._way.run(lambda: self._commit(rows))
            if not taken:
                self._open = False
                failpoint("W4")
        except BaseException as error:
            _reraise(error)
        return taken

    def _commit(self, rows: Sequence[BarrierRow]) -> frozenset[BarrierKey]:
        connection = flushed(self._session)
        taken = self._insert(connection, rows)
        if not taken:
            failpoint("W2")
            commit(self._session)
        return taken

    def _insert(self, connection: Connection, rows: Sequence[BarrierRow]) -> frozenset[BarrierKey]:
        """Insert rows; return the keys that were taken."""
        if len(rows) == 1:
            (row,) = rows
            return frozenset() if self._barrier.insert_one(connection, row) else frozenset((row.key,))
        if not rows:
            return frozenset()
        won = self._barrier.insert(connection, sorted(rows))
        return frozenset(row.key for row in rows) - won

    async def abandon(self) -> None:
        self._open = False
        await self._end(given_up=True)

    async def _statement(self, function: Callable[[Connection], T]) -> T:
        try:
            return await self._way.run(lambda: function(Session.connection(self._session)))
        except BaseException as error:
            _reraise(error)

    async def _end(self, *, given_up: bool) -> None:
        """Roll back or cut, bounded, in a task of its own that is never cancelled (SQL-3)."""
        self._permitted = not self._way.keeps_permit
        await self._way.end(self._handler, given_up=given_up)

    def _report_holding(self) -> None:
        at = began(self._session)
        if at is not None and (held := self._database.clock.monotonic() - at) > HOLDING_SECONDS_MAX:
            log.warning(
                "%s held the SQLite writer for %.1f s; nothing else could write meanwhile",
                self._handler,
                held,
            )


def _reraise(error: BaseException) -> NoReturn:
    """Raise what a statement of ours raised, in the words of the port."""
    match classify(error):
        case Failure.BUSY:
            raise StorageBusy(f"Refused: {describe(error)}.") from error
        case Failure.LOST:
            raise StorageUnavailable(f"Outcome unknown: {describe(error)}.") from error
        case Failure.FATAL:
            raise error


def _pool_size(database: Database) -> int:
    size: Any = getattr(database.engine.pool, "size", None)
    connections = int(size()) if callable(size) else 5
    # On SQLite handlers queue for the one writer with their connections in hand, and the coordinator of the same
    # process needs one too: two are left to it.
    return max(1, connections - 2) if database.writer is not None else connections
