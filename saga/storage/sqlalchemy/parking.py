"""The parking table over SQLAlchemy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import Connection, delete, select

from saga.storage.base import ParkedRow
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.coordinator import statements_for
from saga.storage.sqlalchemy.database import Database


class SqlParkingStore:
    """Parks messages in one namespace's part of the table."""

    def __init__(self, database: Database, namespace: str) -> None:
        self._database = database
        self._namespace = namespace
        # P3: ids are made before the first try, so a rerun after a lost COMMIT answer inserts nothing twice
        self._insert = statements_for(database, namespace).insert_ignore(t.parked)

    async def park(self, rows: Sequence[ParkedRow]) -> None:
        """Store messages; returns after the commit."""
        now = self._database.clock.now()
        values = [
            {
                "id": self._database.ids.uuid7(),
                "namespace": self._namespace,
                "channel": row.channel,
                "reason": row.reason,
                "fingerprint": row.fingerprint,
                "content_type": row.content_type,
                "headers": json.dumps(dict(row.headers)),
                "body": row.body,
                "parked_at": now,
            }
            for row in rows
        ]

        def park(connection: Connection) -> None:
            connection.execute(self._insert, values)

        if values:
            await self._database.run(park)

    async def read(self, id: UUID) -> ParkedRow | None:
        """Return a parked message whole."""
        p = t.parked.c
        query = select(p.channel, p.reason, p.fingerprint, p.content_type, p.headers, p.body).where(
            p.namespace == self._namespace, p.id == id
        )

        def read(connection: Connection) -> ParkedRow | None:
            row = connection.execute(query).one_or_none()
            return None if row is None else ParkedRow(*row[:4], json.loads(row.headers), row.body)

        return await self._database.run(read)

    async def delete(self, id: UUID) -> None:
        """Forget a message that was sent again."""
        p = t.parked.c
        query = delete(t.parked).where(p.namespace == self._namespace, p.id == id)
        await self._database.run(lambda connection: connection.execute(query))
