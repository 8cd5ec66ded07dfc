"""SQLite connections whose driver keeps parameters to itself: at DEBUG aiosqlite logs each call with its arguments.

SQLAlchemy's `hide_parameters` does not reach it, and handlers' statements go through our engine, too (L-11).
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import aiosqlite

THREAD_SECONDS_MAX: Final = 5.0


class _Call:
    """A call for the driver's thread; it shows the name of the function and nothing else."""

    __slots__ = ("_call", "_name")

    def __init__(self, function: Callable[..., Any], call: Callable[[], Any]) -> None:
        self._name = getattr(function, "__name__", "call")
        self._call = call

    def __call__(self) -> Any:
        return self._call()

    def __repr__(self) -> str:
        return self._name


class QuietConnection(aiosqlite.Connection):
    """An aiosqlite connection that logs which function is called, and not with what."""

    async def _connect(self) -> aiosqlite.Connection:
        try:
            return await super()._connect()
        except Exception:
            # the driver tells its thread to end and does not wait: it would answer a loop that may be closed by then
            await asyncio.to_thread(self._thread.join, THREAD_SECONDS_MAX)
            raise

    async def _execute(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = _Call(fn, partial(fn, *args, **kwargs))
        return await super()._execute(call)  # type: ignore[no-untyped-call]  # the driver leaves it unannotated


def connect(database: str, **options: Any) -> QuietConnection:
    """Return a connection to be awaited: `async_creator_fn` of SQLAlchemy's dialect."""
    connection = QuietConnection(partial(sqlite3.connect, database, **options), iter_chunk_size=64)
    connection._thread.daemon = (
        True  # as the dialect does with those it makes: none may hold up the end of a process
    )
    return connection
