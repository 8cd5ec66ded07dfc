"""An app: what one service runs, declared, started and stopped; `saga/running.py` puts its parts together.

    app = App("sqlite:///saga.db", sagas=[money_transfer], participants=[accounts])

    async with app:
        handle = await app.client.start(money_transfer, Transfer(...), id="t-1")
        print(await handle.result())

Going to servers changes two URLs: `App("postgresql://...", broker="amqp://...")`. Where there is no broker, the
database is one: `App("postgresql://...", broker="database://")`, and other services name it by its URL. A service that
owns activities gives its own database and its participants; the coordinator's service gives sagas. An app is an object,
there are no globals, and several may live in one process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Final

from saga.brokers.base import Broker, Checked, Finding
from saga.client import Client
from saga.declared import Declared
from saga.errors import ConfigurationError
from saga.outbox.events import Outbox
from saga.running import Health, Running

log: Final[logging.Logger] = logging.getLogger("saga.app")

ROLE_START_SECONDS: Final = 12.0
"""Bound of a role's start as a whole: every call has one of its own, and slow ones stand in a row."""


class App(Declared):
    """What one service runs: its database, its broker, its sagas, participants and inboxes."""

    _running: Running | None = None

    async def __aenter__(self) -> App:
        """Start everything this app has: coordinator, relay, participants."""
        await self.start(coordinator=True, participants=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @asynccontextmanager
    async def as_client(self) -> AsyncIterator[Client]:
        """Run the client only: a service that starts sagas which others coordinate."""
        await self.start(coordinator=False, participants=False)
        try:
            yield self.client
        finally:
            await self.stop()

    @asynccontextmanager
    async def lifespan(self, server: object = None) -> AsyncIterator[None]:
        """Run everything this app has while a web server serves: `FastAPI(lifespan=app.lifespan)`.

        Any framework that takes a lifespan may call it, in each of its workers. Raises what `start` does, which ends
        the server's start; `stop` follows when the server has answered its last request.
        """
        async with self:
            yield

    @asynccontextmanager
    async def client_lifespan(self, server: object = None) -> AsyncIterator[None]:
        """The same for the client only, where coordinator and participants are processes of their own."""
        async with self.as_client():
            yield

    async def get_client(self) -> Client:
        """Return `client`; as a dependency, `Depends(app.get_client)`, it is asked for while the app runs."""
        return self.client

    @asynccontextmanager
    async def as_operator(self) -> AsyncIterator[Client]:
        """Run a client that needs the database only: what it sends leaves through the outbox of those that coordinate.

        The broker is connected when a dead letter is sent again, and not before.
        """
        await self.start(coordinator=False, participants=False, broker=False)
        try:
            yield self.client
        finally:
            await self.stop()

    async def start(self, *, coordinator: bool, participants: bool, broker: bool = True) -> None:
        """Connect, check database, schema and broker, and start the roles.

        An embedded database (SQLite) is made and upgraded first; others never are. Raises InsecureLink, SchemaMismatch,
        UnsupportedDatabase, StorageUnavailable, BrokerUnavailable, TopologyMismatch, MissingCapability,
        RetentionTooShort, DefinitionChanged; nothing is left running then.
        """
        await self._start(None, coordinator=coordinator, participants=participants, broker=broker)

    async def _start(
        self, seconds: float | None, *, coordinator: bool, participants: bool, broker: bool
    ) -> None:
        if self._running is not None:
            raise ConfigurationError("The app is running already.")
        self.check_links(broker=broker)
        running = Running(self, clock=self._clock, ids=self._ids, archive=self._archive)
        try:
            async with asyncio.timeout(seconds):
                await running.start(
                    coordinator=coordinator and bool(self.registry.served()),
                    participants=participants and bool(self.participants or self.inboxes),
                    events=bool(self.topics or self.inboxes) and (coordinator or participants),
                    broker=broker,
                )
        except TimeoutError:
            await running.stop(timedelta(seconds=1))
            raise running.too_slow() from None
        except BaseException:
            await running.stop(timedelta(seconds=1))
            raise
        self._running = running

    async def stop(self, grace: timedelta | None = None) -> None:
        """Take no more work, finish what runs within `grace`, hand the rest back (P17). Idempotent."""
        running, self._running = self._running, None
        if running is not None:
            await running.stop(self.settings.grace if grace is None else grace)

    async def check_broker(self) -> list[Finding]:
        """Connect to the broker alone and return what is not as it should be of this app's channels; make nothing.

        Nothing is found where the queues are tables or in the process, nor by another package's adapter that cannot
        look. Raises InsecureLink, BrokerUnavailable, ConfigurationError.
        """
        self.check_links(database=self.queued)
        spawner = self.make_spawner()
        database = self.make_database(spawner)
        broker = self.make_broker(spawner, database)
        try:
            if not isinstance(broker, Checked):
                return []
            await broker.start()
            return list(await broker.check(self.channels()))
        finally:
            await broker.close()
            if database is not None:
                await database.dispose()
            await spawner.close()

    def forget(self) -> None:
        """Forget, in a forked process, what runs in the one that it was forked from. Closes nothing there."""
        self._running = None

    async def run_coordinator(self, stop: asyncio.Event, grace: timedelta | None = None) -> None:
        """Run the coordinator and its relay until `stop` is set. Raises what `start` does, within 12 s."""
        if not self.registry.served():
            raise ConfigurationError("This app has no sagas; give App(sagas=[...]).")
        await self._run_until(stop, grace, coordinator=True, participants=False)

    async def run_participant(self, stop: asyncio.Event, grace: timedelta | None = None) -> None:
        """Run participants and inboxes until `stop` is set. Raises what `start` does, within 12 s."""
        served = (activity for each in self.participants for activity in each.activities.values())
        if not self.inboxes and not any(activity.handler for activity in served):
            raise ConfigurationError(
                "This app has no participant with handlers, nor an inbox; give App(participants=[...])."
            )
        await self._run_until(stop, grace, coordinator=False, participants=True)

    async def _run_until(
        self, stop: asyncio.Event, grace: timedelta | None, *, coordinator: bool, participants: bool
    ) -> None:
        await self._start(ROLE_START_SECONDS, coordinator=coordinator, participants=participants, broker=True)
        log.info("ready")
        try:
            await stop.wait()
        finally:
            await self.stop(grace)

    async def health(self) -> Health:
        """Ask database and broker, each for at most 2 s, whether this process can do its work. Never raises.

        One statement and one question to the broker per channel; ask every few seconds at most.
        """
        return Health(False, False, False) if self._running is None else await self._running.health()

    async def purge(self, *, preview: bool = False) -> Mapping[str, int]:
        """Make one pass of the upkeep now, whoever else makes one: purge what is old enough of all this app declares.

        Returns how much went, by table: runs of `saga_instance` and `saga_barrier`, rows of the others. With `preview`
        nothing is written. Raises ConfigurationError unless the app runs and has a database, StorageUnavailable,
        StorageBusy, and what the archive raises.
        """
        if self._running is None or self._running.keeping is None:
            raise ConfigurationError("An app purges its database while it runs: `async with app:`.")
        return await self._running.keeping.purge(preview=preview)

    @property
    def client(self) -> Client:
        """The client of the running app. Raises ConfigurationError before `start` or without a database."""
        if self._running is None or self._running.client is None:
            raise ConfigurationError("The client is there while the app runs: `async with app:`.")
        return self._running.client

    @property
    def outbox(self) -> Outbox:
        """Domain events of the running app. Raises ConfigurationError before `start` or without topics."""
        if self._running is None or self._running.outbox is None:
            raise ConfigurationError("The outbox is there while an app with topics runs: App(topics=[...]).")
        return self._running.outbox

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop that the app runs in; None while it does not run."""
        return None if self._running is None else self._running.loop

    @property
    def broker(self) -> Broker:
        """The broker of the running app."""
        if self._running is None:
            raise ConfigurationError("The broker is there while the app runs: `async with app:`.")
        return self._running.broker
