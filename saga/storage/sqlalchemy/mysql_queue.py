"""The database broker's statements on MySQL and MariaDB: what differs from the portable ones."""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import Connection, Insert, delete, func, select, update

from saga.clock import Clock, Ids
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.mysql import NOW, insert_ignore
from saga.storage.sqlalchemy.queue import QueueStatements


class MySQLQueueStatements(QueueStatements):
    """Rows that another claims at the same moment are skipped. `presence` returns the lock that this process holds."""

    def __init__(
        self, clock: Clock, ids: Ids, presence: Callable[[], int | None], delayed_of: str | None = None
    ) -> None:
        super().__init__(clock, ids, delayed_of)
        self._presence = presence

    def presence(self) -> int | None:
        return self._presence()

    def now(self, connection: Connection) -> datetime:
        now: datetime = connection.execute(NOW).scalar_one()
        return now

    def insert_channels(self) -> Insert:
        return insert_ignore(t.channel)

    def renew(self, connection: Connection, tokens: Collection[UUID], seconds: float) -> set[UUID]:
        """Whoever is dead is found without a lock, and then changed by his key: claims of the living stay untouched."""
        c, k = t.consumer.c, t.claim.c
        now = self.now(connection)
        ours = (c.token.in_(list(tokens)), c.expires_at > now)
        alive = set(connection.execute(select(c.token).where(*ours).with_for_update()).scalars())
        until = now + timedelta(seconds=seconds)
        connection.execute(update(t.consumer).where(*ours).values(expires_at=until, presence=self.presence()))
        # what is held is read first: who subscribes after it holds nothing of that
        held = set(connection.execute(select(k.token).where(k.token.is_not(None)).distinct()).scalars())
        lock = func.concat("saga-queue-", func.coalesce(c.presence, 0))  # a name that is missing is an error
        gone = (c.expires_at <= now) | (c.presence.is_not(None) & (func.is_free_lock(lock) == 1))
        known = connection.execute(select(c.token, gone.label("gone"))).all()
        living = {row.token for row in known}
        if suspects := [row.token for row in known if row.gone and row.token not in alive]:
            by_key = (c.token.in_(sorted(suspects)), gone)
            dead = set(connection.execute(select(c.token).where(*by_key).with_for_update()).scalars())
            connection.execute(delete(t.consumer).where(c.token.in_(sorted(dead))))
            living -= dead
        if left := held - living:
            connection.execute(
                update(t.claim).where(k.token.in_(sorted(left))).values(token=None, due_at=now)
            )
        return alive
