"""What a pool hands out: never a connection that is known to be dead."""

from __future__ import annotations

import select
from typing import Any, Protocol, cast

from sqlalchemy import Engine, event
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.pool import ConnectionPoolEntry


class _Link(Protocol):
    def is_closed(self) -> bool:
        """Whether the server is gone, as far as it is known without asking it (SQL-8)."""
        ...


def pass_over_the_dead(engine: Engine) -> None:
    """Look at each connection before it is used, and open new ones in the place of those of a dead one's age.

    Otherwise the pool would find out by one failed transaction after the other, and some may run only once. The
    engine's driver must have connections that know (`is_closed`): asyncpg's own, and those of
    `psycopglink` and `mysqllink`.
    """

    @event.listens_for(engine, "checkout")
    def look(_raw: Any, record: ConnectionPoolEntry, _proxy: Any) -> None:
        link = cast(_Link, record.driver_connection)
        if link.is_closed():
            raise InvalidatePoolError


def is_over(descriptor: int) -> bool:
    """Whether the other side has closed the link: nobody reads an idle connection, so the socket is asked."""
    if not hasattr(select, "poll"):
        return False  # Windows finds out by using it
    poll = select.poll()
    poll.register(descriptor, getattr(select, "POLLRDHUP", 0))  # an error and a reset are always told
    return bool(poll.poll(0))
