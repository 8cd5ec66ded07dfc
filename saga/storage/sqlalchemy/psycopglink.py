"""Connections of psycopg with the bounds that asyncpg has by itself: no answer is waited for without end.

SQL-6: an answer that does not come in time is a lost connection, which is what errors of a dead link say.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from psycopg import AsyncConnection, Connection, OperationalError
from psycopg.abc import RV, PQGen
from psycopg.errors import _WaitTimeout
from sqlalchemy import Engine, event

from saga.storage.sqlalchemy.pools import is_over


def options(settings: Mapping[str, str], *, connect_seconds: float, answer_seconds: float) -> dict[str, Any]:
    """Return the arguments that a connection of either kind takes."""
    return {
        "connect_timeout": max(2, int(connect_seconds)),  # less means none, or two
        "options": " ".join(f"-c {name}={_escaped(value)}" for name, value in settings.items()),
        # PG-5, PG-6: psycopg would keep a statement that a migration has spoilt, and its names collide in a pooler
        "prepare_threshold": None,
        "keepalives_idle": int(answer_seconds),
        "keepalives_interval": 1,
        "keepalives_count": 3,
    }


def arguments(
    settings: Mapping[str, str], *, connect_seconds: float, answer_seconds: float
) -> dict[str, Any]:
    """Return the arguments of an asynchronous connection, each of whose waits is bounded."""

    class Bounded(BoundedConnection):
        seconds = answer_seconds

    told = options(settings, connect_seconds=connect_seconds, answer_seconds=answer_seconds)
    return {"async_creator_fn": Bounded.connect, **told}


def bound(engine: Engine, answer_seconds: float) -> None:
    """Let an engine of threads make connections each of whose waits is bounded."""

    class Bounded(BoundedThreadConnection):
        seconds = answer_seconds

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: Any, _record: Any, arguments: Any, named: dict[str, Any]) -> Connection[Any]:
        return Bounded.connect(*arguments, **named)


class BoundedConnection(AsyncConnection[Any]):
    """A connection of the loop."""

    seconds: float

    def is_closed(self) -> bool:
        """Whether it is dead, as far as it is known without a question to the server."""
        return self.closed or is_over(self.pgconn.socket)

    async def wait(self, gen: PQGen[RV], *args: Any, **options: Any) -> RV:
        # cancelling would be too polite: psycopg asks the server to stop, over the same dead link, and waits for it
        timer = asyncio.get_running_loop().call_later(self.seconds, _cut, self.pgconn.socket)
        try:
            return await super().wait(gen, *args, **options)
        finally:
            timer.cancel()


class BoundedThreadConnection(Connection[Any]):
    """A connection of threads, where nothing cancels a wait."""

    seconds: float

    def is_closed(self) -> bool:
        """Whether it is dead, as far as it is known without a question to the server."""
        return self.closed or is_over(self.pgconn.socket)

    def wait(self, gen: PQGen[Any], interval: float = 0.1, timeout: float | None = None) -> Any:
        if timeout is not None:
            return super().wait(gen, interval, timeout)
        try:
            return super().wait(gen, interval, self.seconds)
        except _WaitTimeout:
            self.pgconn.finish()  # closed, which is how the dialect knows a lost connection
            raise OperationalError("the server does not answer") from None


def _cut(descriptor: int) -> None:
    with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as link:  # it may be broken by now
        link.shutdown(socket.SHUT_RDWR)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace(" ", "\\ ")
