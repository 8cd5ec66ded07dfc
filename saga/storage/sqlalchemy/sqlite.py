"""SQLite's dialects: a transaction begins with the process's turn to write and BEGIN IMMEDIATE (LITE-1, P36).

The turn is taken at a transaction's first statement, and given back when the connection returns to the pool, so it
covers COMMIT as well. SQLAlchemy has an event for what is done here, but a single one makes it dispatch for every
statement, a tenth of a short transaction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from sqlalchemy import Connection, Engine, event
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.aiosqlite import SQLiteDialect_aiosqlite
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.pool import PoolProxiedConnection

ASYNC_DRIVER: Final = "sqlite+saga_aiosqlite"
THREAD_DRIVER: Final = "sqlite+saga_pysqlite"
WRITES: Final = "saga_writer"
"""Noted of a connection that has the turn."""
_READS: Final = "saga_reads"


class InTurn(SQLiteDialect_pysqlite):
    """How a transaction begins. Its driver is told to begin none by itself."""

    def __init__(self, take_turn: Callable[[], object] | None = None, **options: Any) -> None:
        """`take_turn` waits until it is this connection's turn; without it, nobody writes in turn: plain BEGIN."""
        super().__init__(**options)
        self._take_turn = take_turn

    def do_begin(self, dbapi_connection: PoolProxiedConnection) -> None:
        info = dbapi_connection.info
        writes = self._take_turn is not None and not info.get(_READS)
        if self._take_turn is not None and writes and not info.get(WRITES):
            self._take_turn()
            info[WRITES] = True
        cursor = dbapi_connection.cursor()
        try:
            cursor.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
        finally:
            cursor.close()


class AsyncInTurn(InTurn, SQLiteDialect_aiosqlite):
    """On the loop's driver."""

    supports_statement_cache: bool = True


class ThreadInTurn(InTurn):
    """On the standard library's driver, for handlers in threads."""

    supports_statement_cache: bool = True


for _driver, _dialect in ((ASYNC_DRIVER, AsyncInTurn), (THREAD_DRIVER, ThreadInTurn)):
    registry.register(_driver.replace("+", "."), __name__, _dialect.__name__)


def configure(engine: Engine, give_back: Callable[[], object]) -> None:
    """Set up an engine's connections, and call `give_back` when one that has the turn returns to the pool."""

    @event.listens_for(engine, "connect")
    def connected(raw: Any, _record: Any) -> None:
        cursor = raw.cursor()
        for pragma in ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL", "PRAGMA foreign_keys=ON"):
            cursor.execute(pragma)
        cursor.close()

    def returned(_raw: Any, record: Any, *_rest: Any) -> None:
        if record is None:
            return
        record.info.pop(_READS, None)
        if record.info.pop(WRITES, None):
            give_back()

    for hook in ("checkin", "invalidate", "soft_invalidate", "close"):
        event.listen(engine.pool, hook, returned)


def reads(connection: Connection) -> None:
    """Let a connection only read, on a snapshot, until it is given back: it waits for no writer, nor one for it."""
    connection.info[_READS] = True
