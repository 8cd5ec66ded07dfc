"""A caller's session must be bound to our database: found before anything is written to it."""

from __future__ import annotations

import os
from typing import Any, Final

from sqlalchemy.engine import URL

from saga.errors import WrongDatabase
from saga.storage.sqlalchemy.database import Database

DEFAULT_PORTS: Final = {"postgresql": 5432}
LOOPBACK: Final = (None, "", "localhost", "127.0.0.1", "::1")


def same_database(session: Any, database: Database) -> None:
    """Raise WrongDatabase for a session of another database."""
    url, ours = session.get_bind().engine.url, database.url
    if place(url) != place(ours):
        raise WrongDatabase(
            f"The session is bound to {url.render_as_string(hide_password=True)}, the coordinator's database is "
            f"{ours.render_as_string(hide_password=True)}; start without session=, or use a session of that one."
        )


def place(url: URL) -> tuple[str, ...]:
    """Return what tells a database from every other, however its address is written."""
    backend, database = url.get_backend_name(), url.database or ""
    if backend == "sqlite":
        return backend, os.path.realpath(database)
    host = "localhost" if url.host in LOOPBACK else str(url.host)
    return backend, database, host, str(url.port or DEFAULT_PORTS.get(backend))
