"""One database: its engine, and the one way to run a transaction on it.

`run(function)` gives a plain SQLAlchemy `Connection` to a synchronous function inside one transaction. The function may
be run several times: after a deadlock, a serialization failure, or when the answer to COMMIT was lost (P3, SQL-1). It
runs in a task of its own that is never cancelled; its waiter may leave (SQL-2, SQL-3).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine
from contextlib import nullcontext
from functools import partial
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Engine, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.util import await_only, greenlet_spawn
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential

from saga.clock import Clock, Ids, Spawner
from saga.errors import ConfigurationError, MissingExtra, StorageBusy, StorageUnavailable
from saga.failpoints import failpoint
from saga.storage.sqlalchemy import quiet, sqlite, threadengine
from saga.storage.sqlalchemy.failures import (
    UNUSABLE_SQLITE,
    Failure,
    classify,
    describe,
    insecure,
    is_refusal,
    sqlite_name,
)
from saga.storage.sqlalchemy.servers import SERVERS, Bounds, Server

T = TypeVar("T")
log: Final[logging.Logger] = logging.getLogger("saga.storage")

STATEMENT_SECONDS: Final = 5.0
LOCK_SECONDS: Final = 3.0
CONNECT_SECONDS: Final = 4.0
TRANSACTION_SECONDS: Final = 10.0
TRIES: Final = 5

_DRIVERS: Final = {
    "sqlite": ("sqlite+aiosqlite", "aiosqlite", ""),
    "sqlite+aiosqlite": ("sqlite+aiosqlite", "aiosqlite", ""),
    "mariadb": ("mysql+asyncmy", "asyncmy", "mysql"),
    "mariadb+asyncmy": ("mysql+asyncmy", "asyncmy", "mysql"),
    "mysql": ("mysql+asyncmy", "asyncmy", "mysql"),
    "mysql+asyncmy": ("mysql+asyncmy", "asyncmy", "mysql"),
    "postgresql": ("postgresql+asyncpg", "asyncpg", "postgres"),
    "postgresql+asyncpg": ("postgresql+asyncpg", "asyncpg", "postgres"),
    "postgresql+psycopg": ("postgresql+psycopg", "psycopg", "psycopg"),
}


def async_url(url: str | URL) -> URL:
    """Return the URL with our async driver. Raises ConfigurationError or MissingExtra, never showing a password."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # their texts quote the address; a password with an @ in it would be shown
        raise ConfigurationError(
            "The database address cannot be read; it looks like postgresql://user:password@host/name, mysql://... "
            "or sqlite:///file."
        ) from None
    if parsed.drivername not in _DRIVERS:
        known = ", ".join(sorted(_DRIVERS))
        raise ConfigurationError(f"The database {parsed.drivername!r} is not supported; use one of {known}.")
    driver, module, extra = _DRIVERS[parsed.drivername]
    try:
        # lint: allow unsafe-import because the name is one of the table's above
        __import__(module)
    except ImportError:
        raise MissingExtra(
            f"The database {parsed.drivername!r} needs: pip install 'saga[{extra}]'."
        ) from None
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigurationError("SQLite needs a file: an in-memory database is gone with its connection.")
    return parsed.set(drivername=driver)


class Database:
    """An engine made inside the running loop, with bounded waits, and its transactions."""

    def __init__(
        self,
        url: str | URL,
        *,
        clock: Clock,
        ids: Ids,
        spawner: Spawner,
        pool_size: int = 5,
        idle_in_transaction_seconds: float | None = 60.0,
        schema: str | None = None,
    ) -> None:
        self.url: URL = async_url(url)
        self.dialect: str = self.url.get_backend_name()
        self.schema = schema
        self.clock = clock
        self.ids = ids
        self.spawner = spawner
        # P36: writers of one process queue here, first come first served, not on SQLite's busy timeout
        self.writer: asyncio.Lock | None = asyncio.Lock() if self.dialect == "sqlite" else None
        self._turn = asyncio.Lock() if self.dialect == "sqlite" else None
        bounds = Bounds(CONNECT_SECONDS, STATEMENT_SECONDS, LOCK_SECONDS, idle_in_transaction_seconds)
        self._server: Server | None = None if self.writer else SERVERS[self.dialect](bounds, schema)
        pool = {"pool_size": pool_size, "max_overflow": 0, "pool_timeout": STATEMENT_SECONDS}
        self.engine: AsyncEngine = (
            self._sqlite_engine(pool_size) if self._server is None else self._server.engine(self.url, **pool)
        )
        # shares the pool; on SQLite every statement needs the writer's turn, so there it would save nothing
        self._autocommit = (
            self.engine.execution_options(isolation_level="AUTOCOMMIT")
            if self._server is not None and self._server.single_statements
            else None
        )
        self._threads: Engine | None = None

    def _sqlite_engine(self, pool_size: int) -> AsyncEngine:
        url, connect_args = self._sqlite_driver()
        writer = self.writer
        assert writer is not None
        engine = create_async_engine(
            url,
            hide_parameters=True,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=STATEMENT_SECONDS,
            connect_args=connect_args,
            take_turn=lambda: await_only(writer.acquire()),
        )
        sqlite.configure(engine.sync_engine, writer.release)
        return engine

    def _sqlite_driver(self) -> tuple[URL, dict[str, Any]]:
        """Return the address for the engine and the arguments of its connections."""
        arguments = {
            "timeout": STATEMENT_SECONDS,
            "isolation_level": None,
            "async_creator_fn": quiet.connect,
        }
        return self.url.set(drivername=sqlite.ASYNC_DRIVER), arguments

    def serve_threads(self, connections: int) -> Engine:
        """Return the engine of sessions in threads, made at the first call, with so many connections of its own.

        Their own, so that a thread that never returns holds none that the loop needs. Call it on the loop. Raises
        MissingExtra if the synchronous driver is not installed.
        """
        if self._threads is None:
            pool = {"pool_size": connections, "max_overflow": 0, "pool_timeout": STATEMENT_SECONDS}
            self._threads = (
                self._sqlite_thread_engine(pool)
                if self._server is None
                else self._server.thread_engine(self.url, **pool)
            )
        return self._threads

    def _sqlite_thread_engine(self, pool: dict[str, Any]) -> Engine:
        writer = self.writer
        assert writer is not None
        take, give_back = threadengine.turns(writer, asyncio.get_running_loop())
        engine = threadengine.sqlite(self.url, busy_seconds=STATEMENT_SECONDS, take_turn=take, **pool)
        sqlite.configure(engine, give_back)
        return engine

    @property
    def place(self) -> str:
        """Where the database is, for people: host, port and name, or the file; never who logs in."""
        if self._server is None:
            return str(self.url.database)
        port = self.url.port or self._server.port
        return f"{self.url.host or 'the local socket'}:{port}/{self.url.database or ''}"

    async def ping(self) -> bool:
        """Return True once the server answered one statement."""
        await self.run(lambda connection: connection.exec_driver_sql("SELECT 1").scalar_one(), single=True)
        return True

    async def run(
        self,
        function: Callable[[Connection], T],
        *,
        lost_commit: str = "",
        single: bool = False,
        once: bool = False,
        reads: bool = False,
    ) -> T:
        """Return what `function` returned, after its transaction committed.

        At most 10 s in all: 5 tries with jittered pauses, as far as the time goes. `lost_commit` names the crash point
        at which a test takes the answer to COMMIT away. `single` says that `function` is one statement, which is a
        transaction by itself where the server takes it without BEGIN: two round trips less. `once` raises at once when
        the connection is lost, for a function that must not run again then. `reads` says that it writes nothing, and
        so need not wait for its turn to write on SQLite. Raises
        StorageUnavailable (connection), StorageBusy (locks), ConfigurationError (refused log-in); what `function`
        raises for itself comes through after a rollback.
        """
        deadline = self.clock.monotonic() + TRANSACTION_SECONDS

        async def attempt() -> T:
            return await self._try(function, lost_commit, single, reads, deadline - self.clock.monotonic())

        try:
            return await attempt()
        except BaseException as error:
            match classify(error):
                case Failure.FATAL:
                    self._raise_refusal(error)
                    raise
                case Failure.LOST if once:
                    raise StorageUnavailable(
                        f"The connection to {self.place} is lost: {describe(error)}."
                    ) from None
            log.info("transaction runs again after %s", describe(error))
        return await self._again(attempt, deadline, (Failure.BUSY,) if once else (Failure.BUSY, Failure.LOST))

    async def _again(
        self, attempt: Callable[[], Coroutine[Any, Any, T]], deadline: float, failures: Collection[Failure]
    ) -> T:
        def enough(state: RetryCallState) -> bool:
            return (
                state.attempt_number >= TRIES - 1 or self.clock.monotonic() + state.upcoming_sleep >= deadline
            )

        retrying = AsyncRetrying(
            stop=enough,
            wait=wait_random_exponential(multiplier=0.05, max=1.0),
            retry=retry_if_exception(lambda error: classify(error) in failures),
            sleep=self.clock.sleep,
            reraise=True,
        )
        try:
            return await retrying(attempt)
        except BaseException as error:
            match classify(error):
                case Failure.BUSY:
                    raise StorageBusy(f"Refused several times in a row: {describe(error)}.") from None
                case Failure.LOST:
                    raise StorageUnavailable(
                        f"The database at {self.place} was not reached: {describe(error)}."
                    ) from None
                case Failure.FATAL:
                    self._raise_refusal(error)
                    raise

    def _raise_refusal(self, error: BaseException) -> None:
        """Say what an operator must see to: nothing here changes it by trying again."""
        if why := insecure(error):
            raise ConfigurationError(
                f"The link to the database at {self.place} is not as its address wants it: {why}."
            ) from None
        if is_refusal(error):
            raise ConfigurationError(
                f"The database at {self.place} refuses the log-in: {describe(error)}."
            ) from None
        if sqlite_name(error).startswith(UNUSABLE_SQLITE):
            raise ConfigurationError(
                f"The file {self.place} cannot be opened as a database: {describe(error)}."
            ) from None

    async def _try(
        self, function: Callable[[Connection], T], lost_commit: str, single: bool, reads: bool, seconds: float
    ) -> T:
        ended: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        run = partial(self._transaction, function, lost_commit, single, reads)
        self.spawner.spawn(tell(run, ended), name="saga-transaction")
        async with asyncio.timeout(max(seconds, 0.0)):
            return await ended

    async def _transaction(
        self, function: Callable[[Connection], T], lost_commit: str, single: bool, reads: bool
    ) -> T:
        alone = single and self._autocommit is not None
        engine = self._autocommit if alone and self._autocommit is not None else self.engine
        run = _run_single if alone else _begin_and_commit
        snapshot = reads and self.writer is not None

        def checked_out() -> T:
            # one switch for checkout, statements and checkin: each would be some passes of the loop by itself
            with engine.sync_engine.connect() as connection:
                if snapshot:
                    sqlite.reads(connection)
                return run(connection, function)

        # P36: the turn comes before the pool, whose connections are opened and handed out in any order
        async with (None if reads else self._turn) or nullcontext():
            result: T = await greenlet_spawn(checked_out)
        if lost_commit:
            failpoint(lost_commit)
        return result

    async def dispose(self) -> None:
        """Close the pools. Bounded; a connection that does not close is abandoned."""
        tasks = {self.spawner.spawn(self.engine.dispose(), name="saga-dispose")}
        if self._threads is not None:
            tasks.add(
                self.spawner.spawn(
                    asyncio.to_thread(threadengine.dispose, self._threads), name="saga-dispose-threads"
                )
            )
        await asyncio.wait(tasks, timeout=STATEMENT_SECONDS)


async def tell(run: Callable[[], Awaitable[T]], ended: asyncio.Future[T]) -> None:
    """Tell the waiter how it ended, if he still waits: a failed try is for him to report, not for the spawner."""
    try:
        result = await run()
    except Exception as error:
        if not ended.done():
            ended.set_exception(error)
    except BaseException:
        ended.cancel()
        raise
    else:
        if not ended.done():
            ended.set_result(result)


def _run_single(connection: Connection, function: Callable[[Connection], T]) -> T:
    try:
        return function(connection)
    except BaseException as error:
        if classify(error) is Failure.LOST:
            connection.invalidate()
        raise


def _begin_and_commit(connection: Connection, function: Callable[[Connection], T]) -> T:
    transaction = connection.begin()
    try:
        result = function(connection)
        transaction.commit()
    except BaseException as error:
        if classify(error) is Failure.LOST:
            connection.invalidate()  # a rollback would wait on the dead link once more (SQL-6)
        else:
            transaction.rollback()
        raise
    return result
