"""The engine of handlers in threads: the same database through a synchronous driver, with a pool of its own.

It keeps what the asynchronous engine keeps: READ COMMITTED and the bounds on servers; on SQLite the
process's one queue of writers (P36). That queue is on the loop, so a thread asks there for its turn, and tells its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.pool import ConnectionPoolEntry

from saga.errors import MissingExtra
from saga.storage.sqlalchemy.pools import pass_over_the_dead
from saga.storage.sqlalchemy.sqlite import THREAD_DRIVER

DRIVER: Final = "postgresql+psycopg"
MYSQL_DRIVER: Final = "mysql+pymysql"
_ASYNCMY_ONLY: Final = ("echo", "stmt_cache_size")
_ASYNCPG_ONLY: Final = (
    "prepared_statement_cache_size",
    "prepared_statement_name_func",
    "async_fallback",
    "direct_tls",
)
"""What an address may say to the asynchronous driver, and the other one does not know."""


def postgresql(
    url: URL,
    settings: dict[str, str],
    *,
    connect_seconds: float,
    answer_seconds: float,
    link: dict[str, str],
    **pool: Any,
) -> Engine:
    """Return an engine on psycopg; `link` is what libpq is told of TLS. Raises MissingExtra."""
    try:
        __import__("psycopg")
    except ImportError:
        raise MissingExtra(
            "A plain `def` handler with a Session on PostgreSQL needs: pip install 'saga[psycopg]'."
        ) from None
    from saga.storage.sqlalchemy import psycopglink  # an extra

    query = {name: value for name, value in url.query.items() if name not in _ASYNCPG_ONLY}
    engine = create_engine(
        url.set(drivername=DRIVER, query=query),
        hide_parameters=True,
        isolation_level="READ COMMITTED",  # PG-4: set, not hoped for
        pool_use_lifo=True,
        connect_args=psycopglink.options(
            settings, connect_seconds=connect_seconds, answer_seconds=answer_seconds
        )
        | link,
        **pool,
    )
    psycopglink.bound(engine, answer_seconds)
    pass_over_the_dead(engine)
    return engine


def mysql(
    url: URL,
    told: Callable[[], str],
    *,
    connect_seconds: float,
    answer_seconds: float,
    link: dict[str, Any],
    **pool: Any,
) -> Engine:
    """Return an engine on PyMySQL; its connections begin with the statement that `told` gives. Raises MissingExtra.

    `link` is what the driver is told of TLS.
    """
    try:
        __import__("pymysql")
    except ImportError:
        raise MissingExtra(
            "A plain `def` handler with a Session on MySQL or MariaDB needs: pip install 'saga[mysql]'."
        ) from None
    from saga.storage.sqlalchemy import mysqllink  # an extra

    query = {name: value for name, value in url.query.items() if name not in _ASYNCMY_ONLY}
    engine = create_engine(
        url.set(drivername=MYSQL_DRIVER, query=query),
        hide_parameters=True,
        isolation_level="READ COMMITTED",  # MDB-3: set, not hoped for
        pool_use_lifo=True,
        connect_args=mysqllink.thread_arguments(
            told(), connect_seconds=connect_seconds, answer_seconds=answer_seconds
        )
        | link,
        **pool,
    )
    mysqllink.bound(engine)
    pass_over_the_dead(engine)
    return engine


def sqlite(url: URL, *, busy_seconds: float, take_turn: Callable[[], object], **pool: Any) -> Engine:
    """Return an engine on the standard library's driver. Who begins to write waits in `take_turn` (LITE-1)."""
    return create_engine(
        url.set(drivername=THREAD_DRIVER),
        hide_parameters=True,
        connect_args={"timeout": busy_seconds, "isolation_level": None, "check_same_thread": False},
        take_turn=take_turn,
        **pool,
    )


def dispose(engine: Engine) -> None:
    """Close the pool; a connection that a thread holds beyond that is closed when it comes back."""
    # listening before the idle ones are closed: between the two it would stay open in a pool that nobody looks at
    event.listen(engine, "checkin", _close)
    engine.dispose()


def _close(_raw: Any, record: ConnectionPoolEntry) -> None:
    record.invalidate()


def turns(
    writer: asyncio.Lock, loop: asyncio.AbstractEventLoop
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return how a thread takes the lock, waiting with all others in one queue, and how it gives it back."""

    def take() -> None:
        asyncio.run_coroutine_threadsafe(writer.acquire(), loop).result()

    def give_back() -> None:
        with suppress(RuntimeError):  # the loop is closed, and with it the queue
            loop.call_soon_threadsafe(writer.release)

    return take, give_back
