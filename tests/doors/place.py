"""A desk that takes orders, a saga that calls it, and a place to run both on any stack, with raw bytes going in."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from decimal import Decimal
from typing import Any, Literal
from uuid import UUID

from pydantic import AwareDatetime, BaseModel
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from saga import Participant, Saga
from saga.app import App
from saga.brokers.base import Broker, Consumer, OutMessage, PublishOutcome
from saga.brokers.memory import MemoryBroker, MemoryQueues
from saga.messages import Reply, commands_channel, decode_replies, replies_channel

SECONDS_MAX = 30.0
SEND_MAX = 1_000


class Item(BaseModel):
    name: str
    count: int = 1


class Order(BaseModel):
    """A payload with a field of each kind that is easily got wrong."""

    number: int
    price: Decimal | None = None
    at: AwareDatetime | None = None
    key: UUID | None = None
    rate: float | None = None
    kind: Literal["new", "old"] = "new"
    item: Item | None = None
    items: dict[str, Item] = {}
    flag: bool = False
    raw: Any = None


class Receipt(BaseModel):
    reference: str


desk = Participant("desk", start_to_close=timedelta(seconds=10))


@desk.activity(no_compensation="it only looks")
async def take(order: Order) -> Receipt:
    return Receipt(reference=f"r-{order.number}")


errand = Saga("errand", Order).step(take).returns(take.out)


class Place:
    """A database with our tables and a broker: apps on them, and a connection for whatever bytes a test wants in."""

    def __init__(self, stack: str, url: str, broker_url: str | None) -> None:
        self.stack = stack
        self.url = url
        self.namespace = f"doors-{secrets.token_hex(4)}"
        self.engine = create_async_engine(url)
        self._broker_url = broker_url
        self.namespaces: set[str] = set()
        """Of all apps, so that their queues can be deleted."""
        self._queues = MemoryQueues()
        self._wire: App | None = None

    @property
    def commands(self) -> str:
        return commands_channel(self.namespace, "desk")

    @property
    def replies(self) -> str:
        return replies_channel(self.namespace)

    def app(self, *, message_bytes_max: int | None = None, **options: Any) -> App:
        """Return an app of this place's namespace with the saga and the desk, unless told otherwise."""
        broker: Any = self._broker_url or MemoryBroker(self._queues)
        if (
            message_bytes_max is not None
            and self._broker_url is not None
            and self._broker_url.startswith("amqp")
        ):
            from saga.brokers.rabbitmq import RabbitMQBroker, RabbitMQOptions

            broker = RabbitMQBroker(
                self._broker_url, options=RabbitMQOptions(message_bytes_max=message_bytes_max)
            )
        options = {"sagas": [errand], "participants": [desk], "namespace": self.namespace, **options}
        self.namespaces.add(options["namespace"])
        return App(self.url, broker=broker, **options)

    async def wire(self) -> Broker:
        """Return a broker connection of the test's own."""
        if self._wire is None:
            # takes whatever another client of the broker could send
            self._wire = self.app(message_bytes_max=16 * 1024 * 1024)
            await self._wire.start(coordinator=False, participants=False)
        return self._wire.broker

    async def send(self, channel: str, bodies: Sequence[bytes]) -> list[bytes]:
        """Publish bodies as they are; return those that the broker takes, once it has them all.

        It may refuse what is above the size that it declares, and nothing else.
        """
        wire = await self.wire()
        taken: list[bytes] = []
        for start in range(0, len(bodies), SEND_MAX):
            messages = [
                OutMessage(channel, body, "application/json", headers={"h": "1"})
                for body in bodies[start : start + SEND_MAX]
            ]
            for message, future in zip(messages, wire.publish(messages), strict=True):
                outcome = await future
                if outcome is PublishOutcome.CONFIRMED:
                    taken.append(message.body)
                else:
                    assert outcome is PublishOutcome.REFUSED
                    assert len(message.body) > wire.capabilities.body_bytes_max
        return taken

    async def rows(self, query: str, **parameters: Any) -> list[Any]:
        async with self.engine.connect() as connection:
            return list((await connection.execute(text(query), parameters)).all())

    async def count(self, table: str) -> int:
        rows = await self.rows(f"SELECT count(*) FROM {table} WHERE namespace = :ns", ns=self.namespace)
        return int(rows[0][0])

    async def drained(self, channel: str) -> bool:
        """Whether the broker holds nothing of a channel back."""
        return (await (await self.wire()).status(channel)).messages == 0

    async def close(self) -> None:
        if self._wire is not None:
            await self._wire.stop()
        await self.engine.dispose()


class Replies:
    """What comes out: every reply of a channel, by command id."""

    def __init__(self, consumer: Consumer) -> None:
        self.by_command: dict[str, Reply] = {}
        self.outcomes: Counter[str] = Counter()
        self._consumer = consumer
        self._task = asyncio.create_task(self._receive())

    async def _receive(self) -> None:
        while deliveries := await self._consumer.receive():
            for delivery in deliveries:
                for reply in decode_replies(delivery.body):
                    self.by_command[reply.commandid] = reply
                    self.outcomes[reply.outcome] += 1
            self._consumer.ack(deliveries)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})
        await self._consumer.close()


async def until(reached: Callable[[], Any], what: str) -> None:
    """Poll until `reached()` (awaited) is true, bounded."""
    try:
        async with asyncio.timeout(SECONDS_MAX):
            while not await reached():  # noqa: ASYNC110 - what is waited for is in a database or a broker
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not reached in time: {what}") from None
