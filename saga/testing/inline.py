"""SQLite without a thread: what a statement needs is there at once, so a transaction is one turn of the loop.

aiosqlite gives each connection a thread, and every call two switches to it and back, which is most of what a short
transaction costs. A file that only this loop writes to has nothing to wait for. Where somebody does hold it, such as a
session of the test with a transaction open, the answer is SQLITE_BUSY at once, and the caller tries again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Generator
from typing import Any

import aiosqlite
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine


class InlineConnection(aiosqlite.Connection):
    """An aiosqlite connection whose calls are made where they are awaited."""

    async def _execute(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    async def _connect(self) -> InlineConnection:
        self._connection: sqlite3.Connection | None = self._connector()
        return self

    def __await__(self) -> Generator[Any, None, InlineConnection]:
        return self._connect().__await__()

    async def close(self) -> None:
        self.stop()

    def stop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def run_inline(engine: AsyncEngine) -> None:
    """Let an engine on a SQLite file open connections without threads."""

    def connect(*place: Any, **options: Any) -> InlineConnection:
        options |= {"timeout": 0.0, "check_same_thread": False}
        return InlineConnection(lambda: sqlite3.connect(*place, **options), 64)

    @event.listens_for(engine.sync_engine, "do_connect")
    def opened(_dialect: Any, _record: Any, _arguments: Any, options: dict[str, Any]) -> None:
        options["async_creator_fn"] = connect
