"""The naive form's queues where PostgreSQL is the broker: a polled table, one transaction per message.

As teams write it: workers take the oldest row that nobody else has locked, do the work while they hold it, delete it
and commit; who finds nothing sleeps a little and looks again. A crash gives the row back by its rollback.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    Identity,
    Index,
    Integer,
    String,
    Table,
    Text,
    bindparam,
    delete,
    insert,
    select,
)
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.naive import Data, metadata

WORKERS: Final = 10
"""Rows of one queue that a process holds at a time; each takes a connection."""
QUEUES_MAX: Final = 3
IDLE_SECONDS: Final = 0.02

queue = Table(
    "naive_queue",
    metadata,
    # SQLite counts up only what is called INTEGER there
    Column("id", BigInteger().with_variant(Integer, "sqlite"), Identity(), primary_key=True),
    Column("name", String(200), nullable=False),  # MySQL and MariaDB have no index on a text without a length
    Column("body", Text, nullable=False),
)
Index("naive_queue_oldest", queue.c.name, queue.c.id)

OLDEST: Final = (
    select(queue.c.id, queue.c.body)
    .where(queue.c.name == bindparam("queue"))
    .order_by(queue.c.id)
    .limit(1)
    .with_for_update(skip_locked=True)
)
DONE: Final = delete(queue).where(queue.c.id == bindparam("key"))


class PolledQueues:
    """`naive.Queues` in one table, with connections of their own."""

    def __init__(self, url: str, prefix: str) -> None:
        self._url = url
        self._prefix = prefix
        self._workers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self._engine = create_async_engine(
            self._url, pool_size=WORKERS * QUEUES_MAX, max_overflow=0, pool_use_lifo=True
        )
        self._publishing = create_async_engine(
            self._url, pool_size=WORKERS, max_overflow=0, pool_use_lifo=True
        )

    async def publish(self, name: str, body: Data) -> None:
        """Return when the row is committed."""
        async with self._publishing.begin() as connection:
            row = {"name": f"{self._prefix}.{name}", "body": json.dumps(body)}
            await connection.execute(insert(queue), row)

    async def consume(self, name: str, prefetch: int, work: Callable[[Data], Awaitable[None]]) -> None:
        """Work on a few messages at once; each is deleted in the transaction that took it."""
        for _ in range(min(prefetch, WORKERS)):
            polling = self._poll(f"{self._prefix}.{name}", work)
            self._workers.append(asyncio.create_task(polling))

    async def _poll(self, name: str, work: Callable[[Data], Awaitable[None]]) -> None:
        while True:
            async with self._engine.begin() as connection:
                row: Any = (await connection.execute(OLDEST, {"queue": name})).one_or_none()
                if row is not None:
                    await work(json.loads(row.body))
                    await connection.execute(DONE, {"key": row.id})
            if row is None:
                await asyncio.sleep(IDLE_SECONDS)

    async def stop(self) -> None:
        for worker in self._workers:
            worker.cancel()
        if self._workers:
            await asyncio.wait(self._workers)
        await self._engine.dispose()
        await self._publishing.dispose()
