"""An outbox under test: rows as old as a test wants, relays that sweep when told, a broker that answers as told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, insert, select

from saga.brokers.base import Capabilities, Channel, ChannelStatus, Consumer, OutMessage, PublishOutcome
from saga.brokers.memory import MEMORY
from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.outbox.publisher import DirectPublisher
from saga.outbox.relay import Relay
from saga.storage.base import StoredRow, part_of
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.database import Database
from saga.storage.sqlalchemy.outbox import SqlOutboxStore

NAMESPACE = "default"
LONG_AGO = timedelta(seconds=30)
ids = SystemIds()


class ManualClock(SystemClock):
    """Local time that moves when the test says so."""

    def __init__(self) -> None:
        self.seconds = 1_000.0

    def monotonic(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        until = self.seconds + seconds
        while self.seconds < until:  # noqa: ASYNC110 - the clock has no event, it is set
            await asyncio.sleep(0)


class ScriptedBroker:
    """Keeps what is sent, and answers each message by its channel: an outcome, or None for no answer yet."""

    capabilities: Capabilities = MEMORY

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.answers: dict[str, PublishOutcome | None] = {}
        self.open: list[asyncio.Future[PublishOutcome]] = []

    def publish(self, messages: Sequence[OutMessage]) -> Sequence[asyncio.Future[PublishOutcome]]:
        futures = []
        for message in messages:
            future: asyncio.Future[PublishOutcome] = asyncio.get_running_loop().create_future()
            self.sent.append(message.body)
            answer = self.answers.get(message.channel, PublishOutcome.CONFIRMED)
            if answer is None:
                self.open.append(future)
            else:
                future.set_result(answer)
            futures.append(future)
        return futures

    def take_sent(self) -> list[bytes]:
        taken, self.sent = self.sent, []
        return taken

    async def start(self) -> None: ...

    async def declare(self, channels: Sequence[Channel]) -> None: ...

    async def consume(self, channel: str, *, prefetch: int) -> Consumer:
        raise NotImplementedError

    async def status(self, channel: str) -> ChannelStatus:
        return ChannelStatus(0, 0)

    async def close(self) -> None: ...


class Node:
    """What one coordinator process has of the outbox: a publisher and a relay."""

    def __init__(self, outbox: Outbox, broker: Any, clock: SystemClock) -> None:
        ports: dict[str, Any] = {"clock": clock, "spawner": outbox.spawner}
        self.store = SqlOutboxStore(outbox.database, NAMESPACE)
        self.publisher = DirectPublisher(broker, self.store, **ports)
        self.relay = Relay(broker, self.store, self.publisher, ids=ids, **ports)

    async def sweep(self, *, woken: bool = False) -> None:
        if woken:
            self.relay.wake()
        await self.relay._sweep()

    @property
    def low(self) -> int:
        return self.relay._low


class Outbox:
    """The tables of one database."""

    def __init__(self, database: Database, spawner: TaskSpawner) -> None:
        self.database = database
        self.spawner = spawner
        self.store = SqlOutboxStore(database, NAMESPACE)

    def node(self, broker: Any, clock: SystemClock | None = None) -> Node:
        return Node(self, broker, clock or SystemClock())

    async def run(self, work: Callable[[Connection], Any]) -> Any:
        return await self.database.run(work)

    async def add(
        self, *bodies: bytes, channel: str = "work", key: UUID | None = None, age: timedelta = LONG_AGO
    ) -> list[StoredRow]:
        """Commit rows, each with a key of its own unless one is given."""
        return list(await self.run(lambda connection: put(connection, bodies, channel, key, age)))

    async def left(self) -> list[bytes]:
        """Return what is still to send, in order."""
        query = select(t.outbox.c.body).order_by(t.outbox.c.id)
        return list(await self.run(lambda connection: connection.execute(query).scalars().all()))

    async def rows(self, table: Any) -> list[Any]:
        return list(await self.run(lambda connection: connection.execute(select(table)).all()))


def put(
    connection: Connection,
    bodies: Collection[bytes],
    channel: str = "work",
    key: UUID | None = None,
    age: timedelta = LONG_AGO,
) -> list[StoredRow]:
    """Insert rows in a transaction that the caller ends."""
    rows = []
    for body in bodies:
        message_id, ordering_key = ids.uuid7(), str(key or ids.uuid7())
        values = {
            "namespace": NAMESPACE,
            "part": part_of(ordering_key),
            "message_id": message_id,
            "channel": channel,
            "ordering_key": ordering_key,
            "body": body,
            "created_at": datetime.now(UTC) - age,
        }
        made = connection.execute(insert(t.outbox).values(**values)).inserted_primary_key
        assert made is not None
        rows.append(StoredRow(made[0], message_id, channel, ordering_key, body))
    return rows
