"""The database broker's store over SQLAlchemy, with its statements in portable Core.

On SQLite the one writer is the lock. PostgreSQL's statements are in `postgresql_queue.py`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from pydantic_core import from_json, to_json
from sqlalchemy import (
    Connection,
    Insert,
    Select,
    bindparam,
    delete,
    exists,
    func,
    insert,
    literal,
    null,
    select,
    union_all,
    update,
)
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from saga.brokers.base import Channel, ChannelStatus, OutMessage, PublishOutcome
from saga.clock import Clock, Ids
from saga.storage.queue import Claimed, Looked
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.database import Database

log: Final[logging.Logger] = logging.getLogger("saga.storage")

NO_HEADERS: Final = "{}"


def headers_text(message: OutMessage) -> str:
    """Return the headers as they are stored."""
    return to_json(dict(message.headers)).decode() if message.headers else NO_HEADERS


class QueueStatements:
    """Everything the database broker reads and writes."""

    def __init__(self, clock: Clock, ids: Ids, delayed_of: str | None = None) -> None:
        """`delayed_of` is the namespace whose delayed outbox rows belong into these queues, if any."""
        self.clock = clock
        self.ids = ids
        self.delayed_of = delayed_of

    def presence(self) -> int | None:
        """Return the lock that tells others that this process lives; None where there is no such thing."""
        return None

    def now(self, connection: Connection) -> Any:
        """Return database time, as a value or as an expression."""
        return self.clock.now()

    def insert_channels(self) -> Insert:
        """Return an INSERT that leaves out the channels that are there."""
        return sqlite_insert(t.channel).on_conflict_do_nothing()

    # --- channels -----------------------------------------------------------------------------

    def declare(self, connection: Connection, channels: Sequence[Channel]) -> list[Channel]:
        """Add channels in the order of their names, so that two processes at once do not deadlock."""
        wanted = {channel.name: channel.parking for channel in channels}
        standing = self._parkings(connection, wanted)
        differing = [
            Channel(name, parking) for name, parking in sorted(standing.items()) if parking != wanted[name]
        ]
        missing = sorted(set(wanted) - set(standing))
        if missing and not differing:
            rows = [{"name": name, "parking": wanted[name]} for name in missing]
            connection.execute(self.insert_channels(), rows)
        return differing

    def _parkings(self, connection: Connection, names: Collection[str]) -> dict[str, str | None]:
        c = t.channel.c
        rows = connection.execute(select(c.name, c.parking).where(c.name.in_(sorted(names))))
        return {row.name: row.parking for row in rows}

    def status(self, connection: Connection, channel: str) -> ChannelStatus | None:
        """Count what waits and who consumes."""
        q, k, c = t.queue.c, t.claim.c, t.consumer.c
        if not self._parkings(connection, [channel]):
            return None
        fresh = select(func.count()).where(q.channel == channel)
        returned = select(func.count()).where(k.channel == channel, k.token.is_(None))
        consumers = select(func.count()).where(c.channel == channel, c.expires_at > self.now(connection))
        waiting: int = connection.execute(fresh).scalar_one() + connection.execute(returned).scalar_one()
        return ChannelStatus(messages=waiting, consumers=connection.execute(consumers).scalar_one())

    # --- publishing ---------------------------------------------------------------------------

    def publish(
        self, connection: Connection, messages: Sequence[OutMessage], length_max: int | None
    ) -> list[PublishOutcome]:
        """Append what is routed and has room."""
        names = {message.channel for message in messages}
        known = self._parkings(connection, names)
        room = {name: len(messages) for name in known}
        if length_max is not None:
            room = {name: length_max - self._length(connection, name, length_max) for name in known}
        outcomes: list[PublishOutcome] = []
        accepted: list[OutMessage] = []
        taken: Counter[str] = Counter()
        for message in messages:
            if message.channel not in known:
                outcomes.append(PublishOutcome.UNROUTABLE)
            elif taken[message.channel] >= room[message.channel]:
                outcomes.append(PublishOutcome.REFUSED)
            else:
                taken[message.channel] += 1
                accepted.append(message)
                outcomes.append(PublishOutcome.CONFIRMED)
        if accepted:
            self.append(connection, accepted)
        return outcomes

    def _length(self, connection: Connection, channel: str, length_max: int) -> int:
        """Count what waits, but not on and on: a queue that is full is counted to its bound."""
        rows = select(t.queue.c.id).where(t.queue.c.channel == channel).limit(length_max).subquery()
        length: int = connection.execute(select(func.count()).select_from(rows)).scalar_one()
        return length

    def append(self, connection: Connection, messages: Sequence[OutMessage]) -> None:
        """Append messages in order."""
        now = self.now(connection)
        connection.execute(
            insert(t.queue),
            [
                {
                    "channel": message.channel,
                    "message_id": self.ids.uuid7(),
                    "ordering_key": message.key,
                    "content_type": message.content_type,
                    "headers": headers_text(message),
                    "body": message.body,
                    "created_at": now,
                }
                for message in messages
            ],
        )

    # --- consuming ----------------------------------------------------------------------------

    def subscribe(
        self,
        connection: Connection,
        token: UUID,
        channel: str,
        seconds: float,
        instead_of: Collection[UUID],
    ) -> bool:
        """Add a consumer in place of its former selves and of those that ran out. Run again, it does the same."""
        self.leave(connection, [token, *instead_of])
        connection.execute(delete(t.consumer).where(t.consumer.c.expires_at <= self.now(connection)))
        expires = self.now(connection) + timedelta(seconds=seconds)
        connection.execute(
            insert(t.consumer).values(
                token=token, channel=channel, expires_at=expires, presence=self.presence()
            )
        )
        return bool(self._parkings(connection, [channel]))

    def leave(self, connection: Connection, tokens: Collection[UUID]) -> None:
        """Remove consumers and give back what they hold."""
        k, c = t.claim.c, t.consumer.c
        connection.execute(delete(t.consumer).where(c.token.in_(list(tokens))))
        connection.execute(
            update(t.claim).where(k.token.in_(list(tokens))).values(token=None, due_at=self.now(connection))
        )

    def claim(
        self, connection: Connection, token: UUID, channel: str, above: int, limit: int
    ) -> list[Claimed]:
        """Move rows from the queue to the claims of `token`, those given back before new ones."""
        q, k = t.queue.c, t.claim.c
        again = (
            connection.execute(
                select(k.id)
                .where(k.token.is_(None), k.channel == channel, k.due_at <= self.now(connection))
                .order_by(k.id)
                .limit(limit)
                .with_for_update(skip_locked=True)
            )
            .scalars()
            .all()
        )
        if again:
            connection.execute(
                update(t.claim)
                .where(k.id.in_(again))
                .values(token=token, due_at=None, deliveries=k.deliveries + 1)
            )
        fresh = (
            connection.execute(
                select(q.id)
                .where(q.channel == channel, q.id > above)
                .order_by(q.id)
                .limit(limit - len(again))
                .with_for_update(skip_locked=True)
            )
            .scalars()
            .all()
        )
        if fresh:
            moved = [q.message_id, q.ordering_key, q.content_type, q.headers, q.body, q.created_at]
            rows = select(
                q.id,
                q.channel,
                bindparam("b_token", token, type_=k.token.type),
                bindparam("b_deliveries", 1),
                *moved,
            ).where(q.id.in_(fresh))
            names = ["id", "channel", "token", "deliveries", *(column.name for column in moved)]
            connection.execute(insert(t.claim).from_select(names, rows))
            connection.execute(delete(t.queue).where(q.id.in_(fresh)))
        taken = [*again, *fresh]
        if not taken:
            return []
        claimed = connection.execute(
            select(k.id, k.deliveries, k.content_type, k.headers, k.body)
            .where(k.id.in_(taken))
            .order_by(k.id)
        )
        return [Claimed(*row) for row in claimed]

    def park(self, connection: Connection, channel: str, worn: Sequence[Claimed]) -> bool:
        """Move claimed rows to the channel's parking channel; False if it has none."""
        parking = self._parkings(connection, [channel]).get(channel)
        if parking is None:
            return False
        reason = {"x-first-death-reason": "delivery_limit", "x-first-death-queue": channel}
        self.append(
            connection,
            [
                OutMessage(parking, row.body, row.content_type, headers={**from_json(row.headers), **reason})
                for row in worn
            ],
        )
        connection.execute(delete(t.claim).where(t.claim.c.id.in_([row.id for row in worn])))
        return True

    def settle(
        self,
        connection: Connection,
        token: UUID,
        acked: Collection[int],
        returned: Collection[int],
        pause_seconds: float,
    ) -> None:
        """Delete and give back what the token still holds."""
        k = t.claim.c
        if acked:
            connection.execute(delete(t.claim).where(k.id.in_(sorted(acked)), k.token == token))
        if returned:
            due = self.now(connection) + timedelta(seconds=pause_seconds)
            connection.execute(
                update(t.claim)
                .where(k.id.in_(sorted(returned)), k.token == token)
                .values(token=None, due_at=due)
            )

    # --- looking ------------------------------------------------------------------------------

    def renew(self, connection: Connection, tokens: Collection[UUID], seconds: float) -> set[UUID]:
        """Prolong consumers that have not run out, and give back what no living one holds."""
        k, c = t.claim.c, t.consumer.c
        now = self.now(connection)
        renewed = connection.execute(
            update(t.consumer)
            .where(c.token.in_(list(tokens)), c.expires_at > now)
            .values(expires_at=now + timedelta(seconds=seconds))
            .returning(c.token)
        )
        alive = set(renewed.scalars())
        connection.execute(
            update(t.claim)
            .where(k.token.is_not(None), ~exists().where(c.token == k.token, c.expires_at > now))
            .values(token=None, due_at=now)
        )
        return alive

    def waiting(self, connection: Connection, channels: Collection[str]) -> tuple[set[str], bool]:
        """Return those of the channels that have something to claim, and whether delayed rows are due."""
        q, k, d = t.queue.c, t.claim.c, t.outbox_delayed.c
        now = self.now(connection)
        looks: list[Select[Any]] = [
            select(literal(channel)).where(
                exists().where(q.channel == channel)
                | exists().where(k.token.is_(None), k.channel == channel, k.due_at <= now)
            )
            for channel in sorted(channels)
        ]
        looks.append(select(null()).where(exists().where(d.namespace == self.delayed_of, d.due_at <= now)))
        found = set(connection.execute(union_all(*looks)).scalars())
        return found - {None}, None in found


class SqlQueueStore:
    """Adapter of `QueueStore`. `statements` are those of the database's dialect."""

    def __init__(self, database: Database, statements: QueueStatements) -> None:
        self._database = database
        self._sql = statements

    async def declare(self, channels: Sequence[Channel]) -> Sequence[Channel]:
        return await self._database.run(lambda connection: self._sql.declare(connection, channels))

    async def publish(
        self, messages: Sequence[OutMessage], *, length_max: int | None
    ) -> Sequence[PublishOutcome]:
        return await self._database.run(
            lambda connection: self._sql.publish(connection, messages, length_max),
            single=length_max is None,
            once=True,
        )

    async def status(self, channel: str) -> ChannelStatus | None:
        return await self._database.run(lambda connection: self._sql.status(connection, channel), reads=True)

    async def subscribe(
        self, token: UUID, channel: str, seconds: float, *, instead_of: Collection[UUID] = ()
    ) -> bool:
        return await self._database.run(
            lambda connection: self._sql.subscribe(connection, token, channel, seconds, instead_of)
        )

    async def claim(
        self, token: UUID, channel: str, *, above: int, limit: int, deliveries_max: int
    ) -> Sequence[Claimed]:
        claimed = await self._database.run(
            lambda connection: self._sql.claim(connection, token, channel, above, limit),
            single=True,
            once=True,
        )
        worn = [row for row in claimed if row.deliveries > deliveries_max]
        if not worn:
            return claimed
        # they are claimed by now, so nobody else parks them beside us
        parked = await self._database.run(
            lambda connection: self._sql.park(connection, channel, worn), once=True
        )
        if not parked:
            return claimed
        log.warning("%d messages of %s were delivered too often and are parked", len(worn), channel)
        return [row for row in claimed if row.deliveries <= deliveries_max]

    async def settle(
        self, token: UUID, acked: Collection[int], returned: Collection[int], pause_seconds: float
    ) -> None:
        await self._database.run(
            lambda connection: self._sql.settle(connection, token, acked, returned, pause_seconds),
            single=not (acked and returned),
            once=bool(returned),  # a second time could give back what was claimed again in between
        )

    async def leave(self, tokens: Collection[UUID]) -> None:
        await self._database.run(lambda connection: self._sql.leave(connection, tokens))

    async def look(self, channels: Collection[str], renewed: Collection[UUID], seconds: float) -> Looked:
        alive: set[UUID] = set()
        if renewed:
            alive = await self._database.run(
                lambda connection: self._sql.renew(connection, renewed, seconds), single=True, once=True
            )
        waiting, due = await self._database.run(
            lambda connection: self._sql.waiting(connection, channels), single=True, once=True, reads=True
        )
        return Looked(waiting, alive, due)
