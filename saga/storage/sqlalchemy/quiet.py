"""SQLite connections whose driver keeps parameters to itself: at DEBUG aiosqlite logs each call with its arguments.

SQLAlchemy's `hide_parameters` does not reach it, and handlers' statements go through our engine, too (L-11).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from functools import partial
from typing import Any

import aiosqlite


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
