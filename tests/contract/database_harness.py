"""The contract's harnesses for the database broker: servers behind a proxy each, SQLite behind a link to cut."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeVar, cast

from sqlalchemy import Connection, delete, false

from devservices import LocalMariaDb, LocalMySql, LocalPostgres
from saga.adapters import queues_of
from saga.brokers.base import Broker, Capabilities
from saga.brokers.database import DATABASE, DatabaseBroker, DatabaseOptions
from saga.clock import SystemClock, SystemIds, TaskSpawner
from saga.errors import StorageUnavailable
from saga.storage.queue import Bell, QueueStore
from saga.storage.sqlalchemy import tables as t
from saga.storage.sqlalchemy.database import Database
from saga.testing.contract.harness import ContractBroken, Harness
from tests.proxy import Proxy

T = TypeVar("T")


class DatabaseHarness(Harness):
    """What both have in common. `url` is a database that has our tables; harnesses may share it."""

    publish_seconds_max = 2.5
    delivery_limit = 5
    patience_seconds = 60.0
    settle_seconds = 0.15
    acks_seconds_max = 3.0
    """Acks of a broker that is parted are on their way for longer, and are not waited for."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self._prefix = f"contract-{SystemIds().uuid7().hex[:20]}"
        self._ports: dict[str, Any] = {
            "clock": SystemClock(),
            "ids": SystemIds(),
            "spawner": self.spawner,
        }
        self._direct: Database | None = None
        self._brokers: list[Broker] = []

    @property
    def capabilities(self) -> Capabilities:
        return DATABASE

    def _options(self, queue_length_max: int | None) -> DatabaseOptions:
        return DatabaseOptions(
            visibility_seconds=2.0,
            poll_seconds=0.05,
            retry_seconds=0.02,
            delivery_limit=self.delivery_limit,
            queue_length_max=queue_length_max,
            publish_seconds_max=self.publish_seconds_max,
            backoff_seconds=0.05,
            backoff_seconds_max=0.2,
        )

    async def delete(self, channel: str) -> None:
        def remove(connection: Connection) -> None:
            for table, column in ((t.channel, "name"), (t.queue, "channel"), (t.claim, "channel")):
                connection.execute(delete(table).where(table.c[column] == channel))

        await self._reach().run(remove)

    async def soon(self, what: Coroutine[Any, Any, T]) -> T:
        task = self.spawner.spawn(what, name="behaviour")
        done, _ = await asyncio.wait({task}, timeout=self.patience_seconds)
        if not done:
            task.cancel()
            raise ContractBroken("took too long")
        return task.result()

    async def settle(self) -> None:
        await asyncio.sleep(self.settle_seconds)
        until = self._ports["clock"].monotonic() + self.acks_seconds_max
        while self._ports["clock"].monotonic() < until:
            if all(map(_is_idle, self._brokers)):
                break
            await asyncio.sleep(0.01)
        # a commit of ours, so that a database that stands still for a while is waited for
        await self._reach().run(lambda connection: connection.execute(delete(t.queue).where(false())))

    def _reach(self) -> Database:
        if self._direct is None:
            self._direct = Database(self._url, **self._ports)
        return self._direct

    def unique_prefix(self) -> str:
        return self._prefix

    async def clean_up(self) -> None:
        await asyncio.gather(*(broker.close() for broker in self._brokers))
        if self._direct is not None:
            await self._direct.dispose()
        await self.spawner.close()


def _is_idle(broker: Broker) -> bool:
    """Whether its acks have arrived."""
    return all(consumer._settling.idle for consumer in cast(DatabaseBroker, broker)._consumers)


class TellingBell:
    """A bell that tells when the broker knows of the link's loss."""

    def __init__(self, inner: Bell) -> None:
        self._inner = inner
        self.up = asyncio.Event()
        self.lost = asyncio.Event()

    async def listen(self, heard: Callable[[str], None], lost: Callable[[], None]) -> None:
        def rung(channel: str) -> None:
            self.up.set()  # it rings once when it begins to listen
            heard(channel)

        def gone() -> None:
            self.up.clear()
            lost()
            self.lost.set()

        await self._inner.listen(rung, gone)

    async def ring(self, channels: Collection[str]) -> None:
        await self._inner.ring(channels)


class ServerHarness(DatabaseHarness):
    """Each broker object reaches the server through a proxy of its own."""

    def __init__(self, url: str, server: LocalPostgres | LocalMariaDb | LocalMySql | None = None) -> None:
        """`server` is what `restart` kills; only behaviours of a durable broker need it."""
        super().__init__(url)
        self._server = server
        self._stack = AsyncExitStack()
        self._links: dict[Broker, Proxy] = {}
        self._bells: dict[Broker, TellingBell] = {}

    async def connect(self, *, queue_length_max: int | None = None) -> Broker:
        link = await self._stack.enter_async_context(Proxy(self._url))
        database = Database(link.url, **self._ports)
        store, inner = queues_of(database)
        bell = TellingBell(inner)
        options = self._options(queue_length_max)
        broker = DatabaseBroker(store, bell, options=options, close=database.dispose, **self._ports)
        self._links[broker] = link
        self._bells[broker] = bell
        self._brokers.append(broker)
        await broker.start()
        return broker

    async def cut(self, broker: Broker) -> None:
        bell = self._bells[broker]
        async with asyncio.timeout(self.patience_seconds):
            await bell.up.wait()  # it may still be on its way back from the cut before
            bell.lost.clear()
            self._links[broker].reset()
            # an ack over a new connection, before the loss of the others is known, would be no lost ack
            await bell.lost.wait()

    async def part(self, broker: Broker) -> None:
        self._links[broker].refuse()
        self._links[broker].reset()
        await self.settle()  # until the broker object knows

    async def rejoin(self, broker: Broker) -> None:
        self._links[broker].heal()

    async def die(self, broker: Broker) -> None:
        self._links[broker].refuse()
        self._links[broker].reset()

    async def restart(self) -> None:
        assert self._server is not None
        self._server.kill()
        await asyncio.to_thread(self._server.start)

    async def clean_up(self) -> None:
        for link in self._links.values():
            link.refuse()  # no new connection may be half made when the proxy goes
        await super().clean_up()
        await self._stack.aclose()


class Link:
    """What stands between a broker and its file; while it is away nothing passes."""

    def __init__(self) -> None:
        self.away = False
        self.lost: Callable[[], None] = lambda: None

    def cut(self) -> None:
        self.lost()

    def cross(self) -> None:
        if self.away:
            raise StorageUnavailable


class LinkedStore:
    """A store at the end of a link."""

    def __init__(self, inner: QueueStore, link: Link) -> None:
        self._inner = inner
        self._link = link

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self._inner, name)

        async def across(*arguments: Any, **named: Any) -> Any:
            self._link.cross()
            return await method(*arguments, **named)

        return across


class LinkedBell:
    """A bell that hears of the link's loss, as NOTIFY's connection does."""

    def __init__(self, inner: Bell, link: Link) -> None:
        self._inner = inner
        self._link = link

    async def listen(self, heard: Callable[[str], None], lost: Callable[[], None]) -> None:
        self._link.lost = lost
        await self._inner.listen(heard, lost)

    async def ring(self, channels: Collection[str]) -> None:
        self._link.cross()
        await self._inner.ring(channels)


class SqliteHarness(DatabaseHarness):
    """Each broker object has a connection pool of its own on the file, as another process would."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._links: dict[Broker, Link] = {}

    async def connect(self, *, queue_length_max: int | None = None) -> Broker:
        link = Link()
        ports = {**self._ports, "spawner": TaskSpawner()}
        database = Database(self._url, **ports)
        store, bell = queues_of(database)
        broker = DatabaseBroker(
            cast(QueueStore, LinkedStore(store, link)),
            LinkedBell(bell, link),
            options=self._options(queue_length_max),
            close=database.dispose,
            **ports,
        )
        self._links[broker] = link
        self._brokers.append(broker)
        await broker.start()
        return broker

    async def cut(self, broker: Broker) -> None:
        await asyncio.sleep(0)  # a broker that was just started begins to listen
        self._links[broker].cut()

    async def part(self, broker: Broker) -> None:
        self._links[broker].away = True
        await self.cut(broker)

    async def rejoin(self, broker: Broker) -> None:
        self._links[broker].away = False

    async def die(self, broker: Broker) -> None:
        await self.part(broker)

    async def restart(self) -> None:
        """There is no server that could crash: every process loses its link and comes back."""
        for link in self._links.values():
            link.cut()
