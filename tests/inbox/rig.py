"""A service that consumes events: an app on a stack, its own tables, and whatever bodies a test puts on its topic."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Final

from pydantic import BaseModel
from sqlalchemy import Column, Integer, MetaData, String, Table, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from saga import App, Inbox
from saga.brokers.base import OutMessage, PublishOutcome
from saga.clock import SystemClock
from saga.inbox.service import InboxService
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.database import async_url
from tests.plugins.watch import CANARY

SECONDS_MAX: Final = 30.0
JSON: Final = "application/cloudevents+json"
clock: Final = SystemClock()

own = MetaData()
mail = Table(
    "mail",
    own,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("number", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("event", String(200), nullable=False),
)


class OrderPlaced(BaseModel):
    """What happened."""

    number: int
    note: str = CANARY


def envelope(number: int, *, id: str | None = None, **attributes: Any) -> bytes:
    """An event as another system sends it."""
    head = {
        "specversion": "1.0",
        "id": id or secrets.token_hex(8),
        "source": "https://shop.example/orders",
        "type": "OrderPlaced",
        "data": {"number": number, "note": CANARY},
        **attributes,
    }
    return json.dumps({name: value for name, value in head.items() if value is not None}).encode()


async def until(condition: Callable[[], Any]) -> None:
    """Wait until a condition, plain or async, holds."""
    async with asyncio.timeout(SECONDS_MAX):
        while True:
            held = condition()
            if await held if asyncio.iscoroutine(held) else held:
                return
            await clock.sleep(0.01)


class Mailer:
    """The app under test. `start` runs it; a second `start` is the same service started again."""

    def __init__(self, url: str, broker: str) -> None:
        self.url = url
        self.broker = broker
        self.namespace = f"inbox-{secrets.token_hex(4)}"
        self.topic = f"orders-{secrets.token_hex(4)}"
        self.engine: AsyncEngine = create_async_engine(async_url(url))
        self.app: App | None = None

    async def start(self, inbox: Inbox) -> App:
        app = App(
            self.url, broker=self.broker, namespace=self.namespace, topics=[self.topic], inboxes=[inbox]
        )
        await app.start(coordinator=False, participants=True)
        self.app = app
        return app

    async def stop(self) -> None:
        if self.app is not None:
            await self.app.stop()
            self.app = None

    async def send(self, *bodies: bytes) -> None:
        """Put bodies on the topic, confirmed."""
        assert self.app is not None
        messages = [OutMessage(self.topic, body, JSON) for body in bodies]
        for outcome in self.app.broker.publish(messages):
            assert await outcome is PublishOutcome.CONFIRMED

    async def rows(self, statement: Any) -> Sequence[Any]:
        async with self.engine.connect() as connection:
            return (await connection.execute(statement)).all()

    async def mails(self) -> list[int]:
        return sorted(row[0] for row in await self.rows(select(mail.c.number)))

    async def remembered(self) -> int:
        """How many events the inbox knows."""
        return len(
            await self.rows(select(t.inbox.c.message_key).where(t.inbox.c.namespace == self.namespace))
        )

    async def parked(self) -> list[tuple[str, dict[str, str], bytes]]:
        p = t.parked.c
        found = await self.rows(select(p.reason, p.headers, p.body).where(p.namespace == self.namespace))
        return [(reason, json.loads(headers), body) for reason, headers, body in found]

    def held(self) -> int:
        """How many attempts have not ended, their acks included."""
        assert self.app is not None
        assert self.app._running is not None
        (service,) = self.app._running.services
        assert isinstance(service, InboxService)
        return len(service._events._open) + service._outgoing.pending

    async def quiet(self) -> None:
        """Wait until the topic holds nothing, and nothing of it waits for a later attempt."""
        assert self.app is not None
        app = self.app
        delayed = select(t.outbox_delayed.c.message_id).where(t.outbox_delayed.c.namespace == self.namespace)
        waiting = select(t.outbox.c.id).where(t.outbox.c.namespace == self.namespace)

        async def empty() -> bool:
            if await self.rows(delayed) or await self.rows(waiting):
                return False
            return (await app.broker.status(self.topic)).messages == 0 and self.held() == 0

        await until(empty)


async def write(session: AsyncSession, number: int, attempt: int, event: str) -> None:
    """The handler's business write."""
    await session.execute(insert(mail).values(number=number, attempt=attempt, event=event))
