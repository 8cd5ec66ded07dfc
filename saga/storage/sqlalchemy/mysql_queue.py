"""The database broker's statements on MySQL and MariaDB: what differs from the portable ones."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Insert, select, update

from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.mysql import NOW, insert_ignore
from saga.storage.sqlalchemy.queue import QueueStatements


class MySQLQueueStatements(QueueStatements):
    """Rows that another claims at the same moment are skipped."""

    def now(self, connection: Connection) -> datetime:
        now: datetime = connection.execute(NOW).scalar_one()
        return now

    def insert_channels(self) -> Insert:
        return insert_ignore(t.channel)

    def prolong(self, connection: Connection, tokens: Collection[UUID], now: Any, until: Any) -> set[UUID]:
        c = t.consumer.c
        ours = (c.token.in_(list(tokens)), c.expires_at > now)
        alive = set(connection.execute(select(c.token).where(*ours).with_for_update()).scalars())
        connection.execute(update(t.consumer).where(*ours).values(expires_at=until))
        return alive
