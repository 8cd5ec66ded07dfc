"""The caller's transaction: an async or a plain session, or the connection of either, on our database."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final, TypeVar

from sqlalchemy import Connection
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from saga.errors import WrongDatabase
from saga.storage.sqlalchemy.database import Database
from saga.storage.sqlalchemy.servers import SERVERS

DEFAULT_PORTS: Final = {name: server.port for name, server in SERVERS.items()}
SAME: Final = {"mariadb": "mysql"}
"""Two names of one dialect."""
LOOPBACK: Final = (None, "", "localhost", "127.0.0.1", "::1")
T = TypeVar("T")


async def inside(session: Any, database: Database, function: Callable[[Connection], T]) -> T:
    """Run `function` in the caller's transaction. Raises WrongDatabase before anything is written.

    On a plain session nothing here awaits, so the coroutine can be driven without a loop.
    """
    if isinstance(session, async_scoped_session | scoped_session):
        session = session()
    same_database(session, database)
    if isinstance(session, AsyncSession):
        return await session.run_sync(lambda sync: function(sync.connection()))
    if isinstance(session, AsyncConnection):
        return await session.run_sync(function)
    return function(session.connection() if isinstance(session, Session) else session)


def same_database(session: Any, database: Database) -> None:
    """Raise WrongDatabase for a session or connection of another database, and for what is neither."""
    if isinstance(session, AsyncSession | Session):
        url = session.get_bind().engine.url
    elif isinstance(session, AsyncConnection | Connection):
        url = session.engine.url
    else:
        raise WrongDatabase(
            f"session= takes SQLAlchemy's AsyncSession, Session or connection, and got a {type(session).__name__}."
        )
    ours = database.url
    if place(url) != place(ours):
        raise WrongDatabase(
            f"The session is bound to {url.render_as_string(hide_password=True)}, the coordinator's database is "
            f"{ours.render_as_string(hide_password=True)}; start without session=, or use a session of that one."
        )


def place(url: URL) -> tuple[str, ...]:
    """Return what tells a database from every other, however its address is written."""
    named, database = url.get_backend_name(), url.database or ""
    backend = SAME.get(named, named)
    if backend == "sqlite":
        return backend, os.path.realpath(database)
    host = "localhost" if url.host in LOOPBACK else str(url.host)
    return backend, database, host, str(url.port or DEFAULT_PORTS.get(backend))
