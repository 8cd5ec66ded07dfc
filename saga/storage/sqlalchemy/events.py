"""Domain events over SQLAlchemy: rows of the outbox in the caller's transaction."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, delete, insert

from saga.storage.base import OutboxRow
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.callers import inside
from saga.storage.sqlalchemy.coordinator import statements_for
from saga.storage.sqlalchemy.database import Database
from saga.storage.sqlalchemy.statements import queue_row


class SqlEventStore:
    """Adapter of `EventStore`."""

    def __init__(self, database: Database, namespace: str, *, queued: bool = False) -> None:
        """`queued`: this database is the broker as well, so that an event is an entry of its queue at once."""
        self._database = database
        self._namespace = namespace
        self._sql = statements_for(database, namespace)
        self._queued = queued

    async def append(self, session: Any, row: OutboxRow, due: timedelta | datetime | None) -> None:
        await inside(session, self._database, lambda connection: self._append(connection, row, due))

    def _append(self, connection: Connection, row: OutboxRow, due: timedelta | datetime | None) -> None:
        values = {"namespace": self._namespace, **row._asdict()}
        now = self._sql.now(connection)
        if due is None and self._queued:
            connection.execute(insert(t.queue).values(queue_row(row, now)))
        elif due is None:
            connection.execute(insert(t.outbox).values(created_at=now, **values))
        else:
            at = due if isinstance(due, datetime) else now + due
            connection.execute(insert(t.outbox_delayed).values(due_at=at, **values))

    async def schedule(self, rows: Sequence[tuple[OutboxRow, timedelta]]) -> None:
        await self._database.run(lambda connection: self._schedule(connection, rows))

    def _schedule(self, connection: Connection, rows: Sequence[tuple[OutboxRow, timedelta]]) -> None:
        now = self._sql.now(connection)
        values = [
            {"namespace": self._namespace, "due_at": now + after, **row._asdict()} for row, after in rows
        ]
        connection.execute(self._sql.insert_ignore(t.outbox_delayed), values)

    async def revoke(self, session: Any, message_id: UUID) -> bool:
        if session is None:
            return await self._database.run(lambda connection: self._revoke(connection, message_id))
        return await inside(session, self._database, lambda connection: self._revoke(connection, message_id))

    def _revoke(self, connection: Connection, message_id: UUID) -> bool:
        # The relay moves a due row by deleting it here, under its lock: whoever deletes it decides.
        d = t.outbox_delayed.c
        query = delete(t.outbox_delayed).where(d.namespace == self._namespace, d.message_id == message_id)
        return connection.execute(query).rowcount == 1
