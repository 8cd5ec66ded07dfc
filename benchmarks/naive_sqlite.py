"""The naive form on SQLite: a polled table, and one transaction per message that takes it, works on it and sends on.

SQLite has one writer, so a transaction that held a message while others publish would wait for itself. As teams write
it: BEGIN IMMEDIATE, delete the oldest message, do the work, insert what follows, COMMIT. One connection per process
writes, and its users take turns in the process, not on the file's lock, which is unfair. An empty queue is looked at by
a read, which holds nobody up. A service's own file is attached to that connection, so that its work and the message are
one transaction there as well.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from sqlalchemy import bindparam, delete, event, insert, make_url, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from benchmarks.naive import SERVICES, Data, Sagas, carry_out
from benchmarks.naive_database import IDLE_SECONDS, queue

BUSY_SECONDS: Final = 60.0
"""How long to wait for the other process: the file's lock is not fair, and who gives up would only ask again."""

WAITING: Final = select(queue.c.id).where(queue.c.name == bindparam("queue")).order_by(queue.c.id).limit(1)
TAKE: Final = delete(queue).where(queue.c.id == WAITING.scalar_subquery()).returning(queue.c.body)

AfterCommit = Callable[[], None]
Work = Callable[[AsyncConnection, Data], Awaitable[AfterCommit | None]]


class File:
    """The queues in one file, and transactions on it and on the service's own file, if there is another one."""

    def __init__(self, url: str, prefix: str, own: str | None) -> None:
        self._url = url
        self._prefix = prefix
        self._own = make_url(own).database if own is not None and own != url else None
        self._turn = asyncio.Lock()
        self._stopping = False
        self._workers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self._writer = self._engine(self._own)
        self._reader = self._engine(None)

    def _engine(self, own: str | None) -> AsyncEngine:
        """Return an engine whose files are as safe as saga's, and whose transactions begin when we say so."""
        options = {"timeout": BUSY_SECONDS, "isolation_level": None}
        engine = create_async_engine(self._url, pool_size=1, max_overflow=0, connect_args=options)

        @event.listens_for(engine.sync_engine, "connect")
        def configure(raw: Any, _record: Any) -> None:
            cursor = raw.cursor()
            for pragma in ("PRAGMA main.journal_mode=WAL", "PRAGMA main.synchronous=FULL"):
                cursor.execute(pragma)
            if own is not None:
                cursor.execute("ATTACH DATABASE ? AS own", (own,))
                for pragma in ("PRAGMA own.journal_mode=WAL", "PRAGMA own.synchronous=FULL"):
                    cursor.execute(pragma)
            cursor.close()

        return engine

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """One transaction, which nobody else's can interrupt."""
        async with self._turn, self._writer.begin() as connection:
            await connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection

    async def send(self, on: AsyncConnection, name: str, body: Data) -> None:
        row = {"name": f"{self._prefix}.{name}", "body": json.dumps(body)}
        await on.execute(insert(queue), row)

    def consume(self, name: str, work: Work) -> asyncio.Task[None]:
        """Work on one message after the other; `work` returns what is to be done when its transaction is committed."""
        worker = asyncio.create_task(self._poll(f"{self._prefix}.{name}", work))
        self._workers.append(worker)
        return worker

    async def _poll(self, name: str, work: Work) -> None:
        while not self._stopping:
            async with self._reader.connect() as connection:
                waiting = await connection.scalar(WAITING, {"queue": name})
            if waiting is None:
                await asyncio.sleep(IDLE_SECONDS)
            while waiting is not None and not self._stopping:
                waiting = await self._work_on_oldest(name, work)

    async def _work_on_oldest(self, name: str, work: Work) -> str | None:
        then: AfterCommit | None = None
        async with self.writing() as connection:
            body: str | None = await connection.scalar(TAKE, {"queue": name})
            if body is not None:
                then = await work(connection, json.loads(body))
        if then is not None:
            then()
        return body

    async def stop(self) -> None:
        self._stopping = True  # a statement of this driver that is cancelled runs on in its thread
        if self._workers:
            await asyncio.wait(self._workers)
        await self._writer.dispose()
        await self._reader.dispose()


class Coordinator:
    """The same as `naive.Coordinator`, with a saga's row and its message in one transaction."""

    def __init__(self, broker: str, *, prefix: str, steps: Sequence[str]) -> None:
        self._file = File(broker, prefix, None)
        self._sagas = Sagas(steps)

    async def start(self) -> None:
        await self._file.start()
        self._file.consume("replies", self._on_reply)

    async def stop(self) -> None:
        await self._file.stop()

    async def execute(self, data: Data) -> str:
        """Start a saga and wait for its end; returns its status."""
        key, ended = self._sagas.expect()
        async with self._file.writing() as connection:
            command = await self._sagas.begin(connection, key, data)
            await self._file.send(connection, SERVICES[command["activity"]], command)
        return await ended

    async def _on_reply(self, connection: AsyncConnection, reply: Data) -> AfterCommit | None:
        moved = await self._sagas.advance(connection, reply)
        if moved is None:
            return None
        if moved.command is None:
            return lambda: self._sagas.end(moved)
        await self._file.send(connection, SERVICES[moved.command["activity"]], moved.command)
        return None


class Participant:
    """The same as `naive.Participant`, with the work, the command and the reply in one transaction."""

    def __init__(self, database: str | None, broker: str, *, prefix: str) -> None:
        self._file = File(broker, prefix, database)
        self._has_database = database is not None

    async def start(self) -> None:
        await self._file.start()
        for service in SERVICES.values():
            self._file.consume(service, self._on_command)

    async def stop(self) -> None:
        await self._file.stop()

    async def _on_command(self, connection: AsyncConnection, command: Data) -> None:
        reply = await carry_out(command, connection if self._has_database else None)
        await self._file.send(connection, "replies", reply)
