"""The composition root: the one place where adapters meet the core and configuration is read.

    app = App("sqlite:///saga.db", sagas=[money_transfer], participants=[accounts])

    async with app:
        handle = await app.client.start(money_transfer, Transfer(...), id="t-1")
        print(await handle.result())

Going to servers changes two URLs: `App("postgresql://...", broker="amqp://...")`. A service that owns activities gives
its own database and its participants; the coordinator's service gives sagas. An app is an object, there are no globals,
and several may live in one process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, Final

from saga.batcher import Lane
from saga.brokers.base import Broker
from saga.client import Client
from saga.clock import Clock, Ids, SystemClock, SystemIds, TaskSpawner
from saga.coordinator.service import Coordinator
from saga.coordinator.verbs import Verbs
from saga.definition.activity import Participant, check_name
from saga.definition.builder import Saga
from saga.definition.registry import Registry
from saga.engine.model import Redrive
from saga.errors import ConfigurationError, MissingCapability
from saga.messages import BODY_BYTES_MAX
from saga.outbox.parking import Parking
from saga.outbox.publisher import DirectPublisher
from saga.outbox.relay import Relay
from saga.participant.served import idle_in_transaction_seconds
from saga.participant.service import ParticipantService
from saga.storage.sqlalchemy import schema
from saga.storage.sqlalchemy.coordinator import SqlClientStore, SqlCoordinatorStore
from saga.storage.sqlalchemy.database import Database
from saga.storage.sqlalchemy.outbox import SqlOutboxStore
from saga.storage.sqlalchemy.parking import SqlParkingStore
from saga.storage.sqlalchemy.participant import SqlParticipantStore
from saga.storage.sqlalchemy.recent import RecentInstances
from saga.storage.sqlalchemy.writer import handler_writes_to

log: Final[logging.Logger] = logging.getLogger("saga.app")

GRACE: Final = timedelta(seconds=30)
REDRIVE: Final = timedelta(seconds=30)
COORDINATOR_POOL: Final = 5


class App:
    """What one service runs: its database, its broker, its sagas and its participants."""

    def __init__(
        self,
        database: str | None,
        *,
        broker: str | Broker = "memory://",
        sagas: Sequence[Saga[Any, Any]] = (),
        participants: Sequence[Participant] = (),
        namespace: str = "default",
        schema: str | None = None,
        concurrency: int = 64,
        pool_size: int = 10,
        redrive: timedelta = REDRIVE,
        clock: Clock | None = None,
        ids: Ids | None = None,
    ) -> None:
        """Check what can be checked without I/O.

        `database` is a SQLAlchemy URL; None for participants that touch no database (no barrier: their effects are at
        least once). `schema` is where our tables live on PostgreSQL. `concurrency` bounds the commands that the
        participants work on at once, `pool_size` the connections and with it the transactions at once. A command
        without an answer is sent again after `redrive`, doubling to ten times that.
        Raises ConfigurationError, DefinitionError, DefinitionChanged.
        """
        check_name(namespace, what="namespace")
        if database is None and sagas:
            raise ConfigurationError("An app with sagas needs a database; only participants can do without.")
        self.namespace = namespace
        first_ms = int(redrive.total_seconds() * 1000)
        if first_ms < 1:
            raise ConfigurationError("redrive is a positive duration; 30 s is the default.")
        self.registry: Registry = Registry(Redrive(first_ms, first_ms * 10))
        for saga in sagas:
            self.registry.register(saga)
        self.participants: tuple[Participant, ...] = tuple(participants)
        self._database_url = database
        self._schema = schema
        self._broker_given = broker
        self._concurrency = concurrency
        self._pool_size = pool_size
        self._clock = clock or SystemClock()
        self._ids = ids or SystemIds()
        self._running: _Running | None = None

    # --- running ------------------------------------------------------------------------------

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

    async def start(self, *, coordinator: bool, participants: bool) -> None:
        """Connect, check database, schema and broker, and start the roles.

        An embedded database (SQLite) is made and upgraded first; others never are. Raises SchemaMismatch,
        UnsupportedDatabase, StorageUnavailable, BrokerUnavailable, TopologyMismatch, MissingCapability,
        DefinitionChanged; nothing is left running then.
        """
        if self._running is not None:
            raise ConfigurationError("The app is running already.")
        running = _Running(self)
        try:
            await running.start(
                coordinator=coordinator and bool(self.registry.served()),
                participants=participants and bool(self.participants),
            )
        except BaseException:
            await running.stop(timedelta(seconds=1))
            raise
        self._running = running

    async def stop(self, grace: timedelta = GRACE) -> None:
        """Take no more work, finish what runs within `grace`, hand the rest back (P17). Idempotent."""
        running, self._running = self._running, None
        if running is not None:
            await running.stop(grace)

    async def run_coordinator(self, stop: asyncio.Event, grace: timedelta = GRACE) -> None:
        """Run the coordinator and its relay until `stop` is set."""
        if not self.registry.served():
            raise ConfigurationError("This app has no sagas; give App(sagas=[...]).")
        await self._run_until(stop, grace, coordinator=True, participants=False)

    async def run_participant(self, stop: asyncio.Event, grace: timedelta = GRACE) -> None:
        """Run the participants until `stop` is set."""
        if not any(activity.handler for each in self.participants for activity in each.activities.values()):
            raise ConfigurationError(
                "This app has no participant with handlers; give App(participants=[...])."
            )
        await self._run_until(stop, grace, coordinator=False, participants=True)

    async def _run_until(
        self, stop: asyncio.Event, grace: timedelta, *, coordinator: bool, participants: bool
    ) -> None:
        await self.start(coordinator=coordinator, participants=participants)
        log.info("ready")
        try:
            await stop.wait()
        finally:
            await self.stop(grace)

    @property
    def client(self) -> Client:
        """The client of the running app. Raises ConfigurationError before `start` or without a database."""
        if self._running is None or self._running.client is None:
            raise ConfigurationError("The client is there while the app runs: `async with app:`.")
        return self._running.client

    @property
    def broker(self) -> Broker:
        """The broker of the running app."""
        if self._running is None:
            raise ConfigurationError("The broker is there while the app runs: `async with app:`.")
        return self._running.broker

    # --- what the parts are made of -----------------------------------------------------------

    def make_spawner(self) -> TaskSpawner:
        """Return the owner of every task of this app."""
        return TaskSpawner()

    async def prepare_database(self, database: Database) -> None:
        """Check server and schema; an embedded database is made and upgraded first."""
        await schema.prepare(database)

    def make_broker(self, spawner: TaskSpawner) -> Broker:
        """Return the broker given, or the adapter of its URL's scheme."""
        given = self._broker_given
        if not isinstance(given, str):
            return given
        scheme = given.partition("://")[0]
        if scheme == "memory":
            from saga.brokers.memory import MemoryBroker

            return MemoryBroker(clock=self._clock, ids=self._ids, spawner=spawner)
        if scheme in ("amqp", "amqps"):
            from saga.brokers.rabbitmq import RabbitMQBroker

            return RabbitMQBroker(given, clock=self._clock, ids=self._ids, spawner=spawner)
        raise ConfigurationError(f"No broker for {scheme!r}; known are memory, amqp and amqps.")

    def make_database(self, spawner: TaskSpawner) -> Database | None:
        """Return the database, with pool and timeouts that fit the roles."""
        if self._database_url is None:
            return None
        serves, coordinates = bool(self.participants), bool(self.registry.served())
        return Database(
            self._database_url,
            clock=self._clock,
            ids=self._ids,
            spawner=spawner,
            # handlers take at most `pool_size` of them, so the coordinator beside them always finds one
            pool_size=self._pool_size * serves + COORDINATOR_POOL * (coordinates or not serves),
            # P28: a participant frozen in a handler must not hold its locks for longer than any attempt may take
            idle_in_transaction_seconds=idle_in_transaction_seconds(self.participants),
            schema=self._schema,
        )

    def check_capabilities(self, broker: Broker) -> None:
        """Refuse a broker that cannot carry our messages. Raises MissingCapability.

        What handlers need of a broker, the participants check.
        """
        can = broker.capabilities
        if can.body_bytes_max < BODY_BYTES_MAX:
            raise MissingCapability(
                f"The broker {can.name} takes bodies of {can.body_bytes_max} bytes, payloads may have {BODY_BYTES_MAX}."
            )


class _Running:
    """The parts of a started app, in the order in which they start; they stop in reverse."""

    def __init__(self, app: App) -> None:
        self._app = app
        self.spawner = app.make_spawner()
        self.broker = app.make_broker(self.spawner)
        self.database = app.make_database(self.spawner)
        self.client: Client | None = None
        self.publisher: DirectPublisher | None = None
        self.relay: Relay | None = None
        self.coordinator: Coordinator | None = None
        self.participants: ParticipantService | None = None

    async def start(self, *, coordinator: bool, participants: bool) -> None:
        self._app.check_capabilities(self.broker)
        if self.database is not None:
            await self._app.prepare_database(self.database)
        await self.broker.start()
        if self.database is not None and self._app.registry.served():
            self._make_coordinator(self.database, coordinator)
        if participants:
            # before the coordinator, so that its first commands meet consumers
            self.participants = self._make_participants()
            await self.participants.start()
        if coordinator and self.coordinator is not None and self.relay is not None:
            await self.coordinator.start()
            self.relay.start()
        else:
            self.coordinator = self.relay = None

    def _make_coordinator(self, database: Database, coordinates: bool) -> None:
        app = self._app
        ports: dict[str, Any] = {"clock": app._clock, "spawner": self.spawner}
        outbox = SqlOutboxStore(database, app.namespace)
        recent, lane = RecentInstances(app._clock), Lane()
        store = SqlCoordinatorStore(database, app.namespace, recent)
        self.publisher = publisher = DirectPublisher(self.broker, outbox, **ports)
        self.relay = Relay(self.broker, outbox, publisher, ids=app._ids, **ports)
        verbs = Verbs(
            app.registry,
            store,
            namespace=app.namespace,
            clock=app._clock,
            ids=app._ids,
            publish=publisher.publish,
            on_closed=lambda runs: client.closed(runs),
        )
        self.client = client = Client(
            app.registry,
            SqlClientStore(database, app.namespace, recent if coordinates else None),
            namespace=app.namespace,
            ids=app._ids,
            publish=publisher.publish,
            after_commit=self._wake_relay_after,
            canceller=verbs,
            inside_handler=lambda: handler_writes_to.get() == database.url.database,
            closed_here=coordinates,
            lane=lane,
            **ports,
        )
        self.coordinator = Coordinator(
            app.registry,
            self.broker,
            store,
            self._make_parking(),
            publisher,
            namespace=app.namespace,
            ids=app._ids,
            on_closed=client.closed,
            lane=lane,
            **ports,
        )

    def _wake_relay_after(self, session: Any) -> None:
        """P19: what the event says of the outcome is not trusted; the relay reads what is really committed."""
        from sqlalchemy import event

        def committed(sync: Any) -> None:
            # a savepoint's release is told as a commit too, and the caller may go on after it
            if sync.info[self] and not sync.in_nested_transaction() and self.relay is not None:
                sync.info[self] = False
                self.relay.wake()

        sync = session.sync_session
        if self not in sync.info:
            event.listen(sync, "after_commit", committed)
        sync.info[self] = True

    def _make_parking(self) -> Parking:
        store = SqlParkingStore(self.database, self._app.namespace) if self.database is not None else None
        return Parking(store, self.broker, clock=self._app._clock, ids=self._app._ids)

    def _make_participants(self) -> ParticipantService:
        app, database = self._app, self.database
        store = None
        if database is not None:
            store = SqlParticipantStore(database, app.namespace, transactions_max=app._pool_size)
        return ParticipantService(
            app.participants,
            self.broker,
            store,
            self._make_parking(),
            namespace=app.namespace,
            clock=app._clock,
            ids=app._ids,
            spawner=self.spawner,
            concurrency=app._concurrency,
        )

    async def stop(self, grace: timedelta) -> None:
        clock = self._app._clock
        ends = clock.monotonic() + grace.total_seconds()
        if self.coordinator is not None:
            await self.coordinator.stop(grace)
        if self.participants is not None:
            await self.participants.stop(timedelta(seconds=max(ends - clock.monotonic(), 0.0)))
        if self.relay is not None:
            await self.relay.stop()
        if self.publisher is not None:
            await self.publisher.close()
        await self.broker.close()
        if self.database is not None:
            await self.database.dispose()
        await self.spawner.close()
