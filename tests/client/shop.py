"""A saga to start: reserve, then charge, which refuses what costs too much. And a place to run it on either stack."""

from __future__ import annotations

import asyncio
import secrets
from collections import namedtuple
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

from pydantic import BaseModel
from sqlalchemy import Column, MetaData, String, Table, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from saga import Participant, Refused, Saga
from saga.app import App
from saga.brokers.memory import MemoryBroker, MemoryQueues
from saga.clock import SystemClock
from tests.plugins.watch import CANARY

SECONDS_MAX = 30.0
LIMIT = 1_000


class Order(BaseModel):
    item: str = "book"
    cents: int = 100
    card: str = CANARY


class Receipt(BaseModel):
    number: str
    card: str = CANARY


shop = Participant("shop", start_to_close=timedelta(seconds=10))


gates: dict[str, asyncio.Event] = {}
"""`reserve` and `charge` wait until a test opens the gate of their item: `gates["book"]`, `gates["charge book"]`."""


@shop.activity
async def reserve(order: Order) -> Receipt:
    if order.item in gates:
        await gates[order.item].wait()
    return Receipt(number=f"r-{order.item}")


@reserve.compensation
async def release(order: Order) -> None: ...


@shop.activity
async def charge(order: Order) -> Receipt:
    if order.cents > LIMIT:
        raise Refused("too_expensive", details={"missing": order.cents - LIMIT})
    if f"charge {order.item}" in gates:
        await gates[f"charge {order.item}"].wait()
    return Receipt(number=f"c-{order.item}")


@charge.compensation
async def pay_back(order: Order) -> None: ...


purchase = Saga("purchase", Order).step(reserve).step(charge).returns(charge.out)

own = MetaData()


def _plain(value: Any) -> Any:
    """What raw SQL gives for our texts and ids on MySQL, as it is on other databases."""
    if not isinstance(value, bytes):
        return value
    return UUID(bytes=value) if len(value) == 16 and not value.isascii() else value.decode()


orders = Table("orders", own, Column("id", String(200), primary_key=True))


def callers_engine(url: str) -> AsyncEngine:
    """An engine as SQLAlchemy's documentation advises, on SQLite with transactions that begin where they are begun.

    Python's SQLite driver would otherwise begin none for a savepoint, and releasing that would commit.
    """
    if not url.startswith("sqlite"):
        return create_async_engine(url)
    engine = create_async_engine(url, connect_args={"isolation_level": None, "timeout": SECONDS_MAX})
    event.listen(engine.sync_engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return engine


class Place:
    """A database with our tables and the shop's, and a broker; as many apps on them as a test wants."""

    def __init__(self, stack: str, url: str, broker_url: str | None) -> None:
        self.stack = stack
        self.url = url
        self.broker_url = broker_url
        shared = broker_url is not None and broker_url != "database://"
        self.namespace = f"client-{secrets.token_hex(4)}" if shared else "default"
        self.queues = MemoryQueues()
        self.engine = callers_engine(url)

    def app(self, *, url: str | None = None, **options: Any) -> App:
        broker: Any = self.broker_url or MemoryBroker(self.queues)
        options = {"sagas": [purchase], "participants": [shop], "namespace": self.namespace, **options}
        return App(url or self.url, broker=broker, **options)

    def session(self) -> AsyncSession:
        """A session of the caller's own, with an engine that knows nothing of ours."""
        return AsyncSession(self.engine, expire_on_commit=False)

    async def rows(self, query: str, **parameters: Any) -> list[Any]:
        async with self.engine.connect() as connection:
            found = await connection.execute(text(query), parameters)
            row: Any = namedtuple("row", found.keys(), rename=True)  # type: ignore[misc]  # whatever is asked for
            return [row(*map(_plain, each)) for each in found]

    async def count(self, table: str) -> int:
        return int((await self.rows(f"SELECT count(*) FROM {table}"))[0][0])

    async def until(self, reached: Callable[[], Any], *, seconds: float = SECONDS_MAX) -> float:
        """Poll until `reached()` (awaited) is true; return how long that took."""
        clock = SystemClock()
        since = clock.monotonic()
        while not await reached():
            assert clock.monotonic() - since < seconds, "not reached in time"
            await clock.sleep(0.02)
        return clock.monotonic() - since
