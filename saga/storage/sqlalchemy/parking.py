"""The parking table over SQLAlchemy."""

from __future__ import annotations

import json
from collections.abc import Sequence

from sqlalchemy import Connection
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from saga.storage.base import ParkedRow
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.database import Database


class SqlParkingStore:
    """Parks messages in one namespace's part of the table."""

    def __init__(self, database: Database, namespace: str) -> None:
        self._database = database
        self._namespace = namespace
        insert = sqlite_insert if database.dialect == "sqlite" else postgresql_insert
        # P3: ids are made before the first try, so a rerun after a lost COMMIT answer inserts nothing twice
        self._insert = insert(t.parked).on_conflict_do_nothing()

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
