"""SQLite without a thread: what a statement needs is there at once, so a transaction is one turn of the loop.

aiosqlite gives each connection a thread, and every call two switches to it and back, which is most of what a short
transaction costs. A file that only this loop writes to has nothing to wait for, so here SQLAlchemy's asynchronous
engine stands on the synchronous driver. Where somebody does hold the file, such as a session of the test with a
transaction open, the answer is SQLITE_BUSY at once, and the caller tries again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Generator
from typing import Any, Final

from sqlalchemy import URL, Pool
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.base import SQLiteExecutionContext
from sqlalchemy.pool import AsyncAdaptedQueuePool
from sqlalchemy.util import await_only

from saga.storage.sqlalchemy.sqlite import InTurn

DRIVER: Final = "saga_inline"


class InlineCursor(sqlite3.Cursor):
    """A cursor that says what SQLAlchemy asks those of asynchronous drivers."""

    server_side: bool = False

    async def _async_soft_close(self) -> None:
        """Close what is held at the server: nothing."""


class InlineConnection(sqlite3.Connection):
    """A connection with such cursors."""

    def cursor(self, factory: Any = InlineCursor) -> Any:
        return super().cursor(factory)


CONNECT: Final[dict[str, Any]] = {
    "timeout": 0.0,
    "isolation_level": None,
    "check_same_thread": False,
    "factory": InlineConnection,
}
"""Arguments of a connection: no waiting, and nothing begun that was not asked for (LITE-1)."""


class _AtOnce:
    """An awaitable that is done already."""

    def __await__(self) -> Generator[Any, None, None]:
        return
        yield


_AT_ONCE: Final = _AtOnce()


class InlineExecution(SQLiteExecutionContext):
    """How a statement runs; `stream()` wants a cursor of its own kind, and any cursor here fetches row by row."""

    def create_server_side_cursor(self) -> Any:
        return self._dbapi_connection.cursor()


class InlineDialect(InTurn):
    """SQLite through the standard library's driver, for an asynchronous engine."""

    driver: str = DRIVER
    supports_statement_cache: bool = True
    supports_server_side_cursors: bool = True
    is_async: bool = True
    execution_ctx_cls: type[SQLiteExecutionContext] = InlineExecution

    @classmethod
    def get_pool_class(cls, url: URL) -> type[Pool]:
        return AsyncAdaptedQueuePool  # whoever waits for a connection lets the loop turn

    def do_execute(self, cursor: Any, statement: Any, parameters: Any, context: Any = None) -> None:
        await_only(_AT_ONCE)  # an asynchronous connection refuses a driver that never awaits
        cursor.execute(statement, parameters)

    def do_executemany(self, cursor: Any, statement: Any, parameters: Any, context: Any = None) -> None:
        await_only(_AT_ONCE)
        cursor.executemany(statement, parameters)


registry.register(f"sqlite.{DRIVER}", __name__, InlineDialect.__name__)


def inline(url: URL) -> URL:
    """Return the address of the same file, through the driver above."""
    return url.set(drivername=f"sqlite+{DRIVER}")
