"""How a process hears that another one put something into a queue: NOTIFY on PostgreSQL, the file's log on SQLite.

MySQL and MariaDB have no way to tell, so there the newest row is looked at again and again.

A notification is sent after the commit and on its own, never inside it: one that travels with a commit makes all such
commits wait for each other (docs/design/0007). What is not heard, the broker's own look finds.
"""

from __future__ import annotations

import asyncio
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection
from typing import Any, Final

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from saga.clock import Clock
from saga.storage.sqlalchemy.database import Database
from saga.storage.sqlalchemy.failures import describe
from saga.storage.sqlalchemy.tables import queue

log: Final[logging.Logger] = logging.getLogger("saga.storage")

CHANNEL: Final = "saga_queue"
LISTEN: Final = "LISTEN saga_queue"
BACKOFF_SECONDS: Final = 0.1
BACKOFF_SECONDS_MAX: Final = 2.0
WATCH_SECONDS: Final = 0.02
LISTEN_SECONDS: Final = 3.0
POLL_SECONDS: Final = 0.1
NEWEST: Final = select(func.max(queue.c.id))

HOLD: Final = text("SELECT pg_advisory_lock(CAST(:lock AS bigint))")
HOLD_BY_NAME: Final = text("SELECT GET_LOCK(CONCAT('saga-queue-', :lock), 0)")
IN_CLUSTER: Final = text("SHOW VARIABLES WHERE variable_name = 'wsrep_on' AND value = 'ON'")

RING: Final = text("""
SELECT count(pg_notify('saga_queue', CAST(:sender AS text) || name)) FROM unnest(CAST(:channels AS text[])) AS c(name)
""")

Heard = Callable[[str], None]
Listening = Callable[[], Awaitable[None]]


class ConnectedBell(ABC):
    """One connection listens, out of the pool for as long as it lives.

    It also holds a lock by which the others see at once that this process is no more: that of a dead one goes with its
    connection.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._engine = database.engine.execution_options(isolation_level="AUTOCOMMIT")
        self._presence: int | None = None

    def presence(self) -> int | None:
        """Return the lock that this process holds."""
        return self._presence

    async def listen(self, heard: Heard, lost: Callable[[], None]) -> None:
        failures = 0
        while True:
            listening = False
            try:
                async with self._engine.connect() as connection:
                    try:
                        listen = await self._open(connection, heard)
                        # another one each time: the server may still hold that of a link which is dead
                        lock = int(self._database.ids.uuid7().int & 0x7FFFFFFFFFFFFFFF)
                        self._presence = lock if await self._hold(connection, lock) else None
                        listening = True
                        failures = 0
                        heard("")  # what was put there before we listened
                        await listen()
                    finally:
                        self._presence = None
                        await connection.invalidate()
            # lint: allow broad-except because this loop is its own supervisor; without it the poll goes on alone
            except Exception as error:
                log.info("listening begins again after %s", describe(error))
            if listening:
                lost()
            failures += 1
            await self._database.clock.sleep(min(BACKOFF_SECONDS * 2.0**failures, BACKOFF_SECONDS_MAX))

    @abstractmethod
    async def _open(self, connection: AsyncConnection, heard: Heard) -> Listening:
        """Begin to listen; return what goes on until the connection is lost."""

    @abstractmethod
    async def _hold(self, connection: AsyncConnection, lock: int) -> bool:
        """Take the lock of that number; False where locks tell nothing."""


class NotifyBell(ConnectedBell):
    """PostgreSQL: NOTIFY. Behind a pooler that lends connections by the transaction neither that nor the lock works:
    then the poll and the time of a claim do the same, later.
    """

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._sender = database.ids.uuid7().hex[-12:]  # so that nobody is woken by his own ring

    async def _open(self, connection: AsyncConnection, heard: Heard) -> Listening:
        def notified(payload: str) -> None:
            sender, name = payload[:12], payload[12:]
            if sender != self._sender:
                heard(name)

        kind = _PsycopgEars if self._engine.dialect.driver == "psycopg" else _AsyncpgEars
        ears = kind((await connection.get_raw_connection()).driver_connection)
        await ears.open(notified)
        return ears.listen

    async def _hold(self, connection: AsyncConnection, lock: int) -> bool:
        await connection.execute(HOLD, {"lock": lock})
        return True

    async def ring(self, channels: Collection[str]) -> None:
        parameters = {"sender": self._sender, "channels": sorted(channels)}
        await self._database.run(
            lambda connection: connection.execute(RING, parameters).scalar(), single=True, once=True
        )


class _AsyncpgEars:
    """What asyncpg has for listening: it reads whatever comes."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._gone = asyncio.Event()

    async def open(self, notified: Callable[[str], None]) -> None:
        self._driver.add_termination_listener(lambda _connection: self._gone.set())
        await self._driver.add_listener(
            CHANNEL, lambda _connection, _pid, _channel, payload: notified(payload)
        )

    async def listen(self) -> None:
        """Return when the connection is gone."""
        await self._gone.wait()


class _PsycopgEars:
    """What psycopg has: it reads only where somebody waits, and an error tells that the connection is gone."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    async def open(self, notified: Callable[[str], None]) -> None:
        self._notified = notified
        await self._driver.execute(LISTEN)

    async def listen(self) -> None:
        while True:
            # shorter than what cuts the connection, which takes a silence for a dead link
            async for notification in self._driver.notifies(timeout=LISTEN_SECONDS):
                self._notified(notification.payload)


class PollBell(ConnectedBell):
    """MySQL and MariaDB: a look at the newest number of the queue, which an index answers."""

    async def _open(self, connection: AsyncConnection, heard: Heard) -> Listening:
        async def look() -> None:
            seen: int | None = None
            while True:
                await self._database.clock.sleep(POLL_SECONDS)
                newest = await connection.scalar(NEWEST)
                if newest != seen:
                    seen = newest
                    heard("")

        return look

    async def _hold(self, connection: AsyncConnection, lock: int) -> bool:
        """Locks by name are a node's own: on Galera another node would take everybody here for dead."""
        if (await connection.execute(IN_CLUSTER)).first() is not None:
            return False
        held: bool = await connection.scalar(HOLD_BY_NAME, {"lock": str(lock)}) == 1
        return held

    async def ring(self, channels: Collection[str]) -> None:
        """The commit has put the row there."""


class FileBell:
    """SQLite: every commit changes the write-ahead log beside the file, which costs no statement to see."""

    def __init__(self, path: str, clock: Clock) -> None:
        self._log = f"{path}-wal"
        self._clock = clock

    async def listen(self, heard: Callable[[str], None], lost: Callable[[], None]) -> None:
        heard("")
        seen = self._state()
        while True:
            await self._clock.sleep(WATCH_SECONDS)
            if (now := self._state()) != seen:
                seen = now
                heard("")

    async def ring(self, channels: Collection[str]) -> None:
        """The commit has changed the file."""

    def _state(self) -> tuple[int, int]:
        try:
            status = os.stat(self._log)
        except OSError:
            return 0, 0
        return status.st_mtime_ns, status.st_size
