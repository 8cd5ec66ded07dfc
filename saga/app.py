"""The composition root: the one place where adapters meet the core and configuration is read.

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
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from saga import adapters, links
from saga.batcher import Lane
from saga.brokers.base import Broker, Channel, Checked, Finding, OutMessage, Severity
from saga.brokers.database import DatabaseBroker
from saga.client import Client
from saga.clock import Clock, Ids, SystemClock, SystemIds, TaskSpawner, within
from saga.coordinator.service import Coordinator
from saga.coordinator.verbs import Verbs
from saga.definition.activity import Activity, Participant, check_name
from saga.definition.builder import Saga
from saga.definition.inbox import Inbox
from saga.definition.registry import Registry
from saga.engine.model import Redrive
from saga.errors import (
    BrokerUnavailable,
    ConfigurationError,
    MissingCapability,
    SagaError,
    StorageUnavailable,
    TopologyMismatch,
)
from saga.inbox.served import limit_seconds
from saga.inbox.service import InboxService
from saga.messages import BODY_BYTES_MAX, commands_channel, parking_channel, replies_channel
from saga.outbox.events import Outbox
from saga.outbox.parking import Parking
from saga.outbox.publisher import CommandPublisher, DirectPublisher
from saga.outbox.queued import QueuedRows
from saga.outbox.relay import Relay
from saga.participant.served import idle_in_transaction_seconds, limits
from saga.participant.service import ParticipantService
from saga.participant.shell import Shell
from saga.storage.base import ParkedRow, StoredRow
from saga.storage.sqlalchemy import schema
from saga.storage.sqlalchemy.coordinator import SqlClientStore, SqlCoordinatorStore
from saga.storage.sqlalchemy.database import Database
from saga.storage.sqlalchemy.events import SqlEventStore
from saga.storage.sqlalchemy.operators import SqlOperatorStore
from saga.storage.sqlalchemy.outbox import SqlOutboxStore
from saga.storage.sqlalchemy.parking import SqlParkingStore
from saga.storage.sqlalchemy.participant import SqlParticipantStore
from saga.storage.sqlalchemy.recent import RecentInstances
from saga.storage.sqlalchemy.writer import handler_writes_to

if TYPE_CHECKING:
    from saga.settings import Settings

log: Final[logging.Logger] = logging.getLogger("saga.app")

COORDINATOR_POOL: Final = 5
HEALTH_SECONDS: Final = 2.0
ROLE_START_SECONDS: Final = 12.0
"""Bound of a role's start as a whole: every call has one of its own, and slow ones stand in a row."""
T = TypeVar("T")


class Health(NamedTuple):
    """Whether a running app reaches what it needs. `database` is True for an app without one."""

    database: bool
    broker: bool
    consuming: bool
    """Its channels have consumers; True for an app that consumes nothing."""

    @property
    def ready(self) -> bool:
        """Whether it does its work."""
        return all(self)


class App:
    """What one service runs: its database, its broker, its sagas, participants and inboxes."""

    def __init__(
        self,
        database: str | None = None,
        *,
        broker: str | Broker | None = None,
        sagas: Sequence[Saga[Any, Any]] = (),
        participants: Sequence[Participant] = (),
        inboxes: Sequence[Inbox] = (),
        namespace: str | None = None,
        topics: Sequence[str] = (),
        schema: str | None = None,
        concurrency: int | None = None,
        pool_size: int | None = None,
        redrive: timedelta | None = None,
        grace: timedelta | None = None,
        production: bool | None = None,
        clock: Clock | None = None,
        ids: Ids | None = None,
    ) -> None:
        """Check what can be checked without I/O.

        What is None here is read from the environment (`SAGA_DATABASE`, ...) or from the file that it names, else it
        has its default: docs/settings.md. `database` is a SQLAlchemy URL; said nowhere, the participants touch no
        database (no barrier: their effects are at least once). `broker` is memory://, amqp://..., database:// for a
        queue in `database` itself, or the SQLAlchemy URL of another database that has the queue, with `?schema=` where
        its tables live in a schema (PostgreSQL). `topics` are channels for domain events (`app.outbox`), declared at
        start, as are those that `inboxes` consume. `schema` is where our tables live on PostgreSQL. `concurrency`
        bounds the commands that the participants work on at once, and as much the events, `pool_size` the connections
        and with it the transactions at once. A command without an answer is sent again after `redrive`, doubling to ten
        times that. `grace` is what `stop` gives to what is under way. In `production` start refuses what is good for a
        developer's machine only, and is else warned of.
        Raises ConfigurationError, DefinitionError, DefinitionChanged.
        """
        self.settings: Settings = self.load_settings(
            database=database,
            broker=broker if broker is None or isinstance(broker, str) else f"{broker.capabilities.name}://",
            namespace=namespace,
            schema=schema,
            concurrency=concurrency,
            pool_size=pool_size,
            redrive=redrive,
            grace=grace,
            production=production,
        )
        given = self.settings
        self.namespace: str = given.namespace
        check_name(self.namespace, what="namespace")
        if given.database is None and sagas:
            raise ConfigurationError("An app with sagas needs a database; only participants can do without.")
        first_ms = max(int(given.redrive.total_seconds() * 1000), 1)
        self.registry: Registry = Registry(Redrive(first_ms, first_ms * 10))
        for saga in sagas:
            self.registry.register(saga)
        self.participants: tuple[Participant, ...] = tuple(participants)
        self.inboxes: tuple[Inbox, ...] = tuple(inboxes)
        self.topics: frozenset[str] = frozenset(topics)
        if given.database is None and (topics or inboxes):
            raise ConfigurationError(
                "An app with topics or inboxes needs a database: events are rows of its outbox, and its inbox."
            )
        for topic in topics:
            check_name(topic, what="topic")
        self._broker_given: str | Broker = (
            given.broker.get_secret_value() if broker is None or isinstance(broker, str) else broker
        )
        self._clock = clock or SystemClock()
        self._ids = ids or SystemIds()
        self._running: _Running | None = None

    def activities(self) -> list[Activity[Any, Any, Any]]:
        """Return what this app's sagas send commands to, and what its participants serve."""
        sent = [step.activity for saga in self.registry.definitions() for step in saga.steps]
        return [
            *sent,
            *(each for participant in self.participants for each in participant.activities.values()),
        ]

    def channels(self) -> list[Channel]:
        """Return the channels that this app sends to or receives from, by name."""
        work = {commands_channel(self.namespace, each.queue) for each in self.activities()}
        if self.registry.served():
            work.add(replies_channel(self.namespace))
        topics = self.topics | {topic for inbox in self.inboxes for topic, _ in inbox.consumers}
        return [
            *(Channel(name, parking_channel(name)) for name in sorted(work)),
            *(Channel(topic) for topic in sorted(topics)),
        ]

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
        DefinitionChanged; nothing is left running then.
        """
        await self._start(None, coordinator=coordinator, participants=participants, broker=broker)

    async def _start(
        self, seconds: float | None, *, coordinator: bool, participants: bool, broker: bool
    ) -> None:
        if self._running is not None:
            raise ConfigurationError("The app is running already.")
        self.check_links(broker=broker)
        running = _Running(self)
        try:
            async with asyncio.timeout(seconds):
                await running.start(
                    coordinator=coordinator and bool(self.registry.served()),
                    participants=participants,
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

    # --- what the parts are made of -----------------------------------------------------------

    def load_settings(self, **code: Any) -> Settings:
        """Return the settings of this app; `code` gives those that it says itself."""
        from saga import settings  # not before an app is made: it takes a while to import

        return settings.load(**code)

    def make_spawner(self) -> TaskSpawner:
        """Return the owner of every task of this app."""
        return TaskSpawner()

    async def prepare_database(self, database: Database) -> None:
        """Check server and schema; an embedded database is made and upgraded first."""
        await schema.prepare(database)

    def make_broker(self, spawner: TaskSpawner, database: Database | None) -> Broker:
        """Return the broker given, or the adapter of its address. `database` is that of this app."""
        return adapters.make_broker(
            self._broker_given, database, self.namespace, clock=self._clock, ids=self._ids, spawner=spawner
        )

    @property
    def queued(self) -> bool:
        """Whether the broker's queues are in this app's own database, so that commands need not be sent."""
        given = self.settings
        if given.database is None:
            return False
        return adapters.queues_in(self._broker_given, given.database.get_secret_value(), given.schema_)

    def make_database(self, spawner: TaskSpawner) -> Database | None:
        """Return the database, with pool and timeouts that fit the roles."""
        given = self.settings
        if given.database is None:
            return None
        serves, coordinates = bool(self.participants or self.inboxes), bool(self.registry.served())
        return Database(
            given.database.get_secret_value(),
            clock=self._clock,
            ids=self._ids,
            spawner=spawner,
            # handlers take at most `pool_size` of them, so the coordinator beside them always finds one
            pool_size=given.pool_size * serves
            + COORDINATOR_POOL * (coordinates or not serves)
            + adapters.QUEUE_POOL * self.queued,
            # P28: a participant frozen in a handler must not hold its locks for longer than any attempt may take
            idle_in_transaction_seconds=idle_in_transaction_seconds(
                [
                    *limits(self.participants),
                    *(limit_seconds(each) for inbox in self.inboxes for each in inbox.consumers.values()),
                ]
            ),
            schema=given.schema_,
        )

    def check_links(self, *, database: bool = True, broker: bool = True) -> None:
        """Warn of links to other hosts that anybody may read or answer. Raises InsecureLink in production mode.

        What a broker object given to the app does is its own affair.
        """
        given, address = self.settings, self._broker_given
        place = None if given.database is None else given.database.get_secret_value()
        there: list[links.Link | None] = []
        if database and place is not None:
            there.append(links.of_database(place))
        if broker and isinstance(address, str):
            links.check_said(address, given.origin("broker"), database=place, production=given.production)
            there.append(links.of_broker(address))
        links.check(there, production=given.production)

    def check_capabilities(self, broker: Broker) -> None:
        """Refuse a broker that cannot carry our messages. Raises MissingCapability.

        What handlers need of a broker, the participants check.
        """
        can = broker.capabilities
        if can.body_bytes_max < BODY_BYTES_MAX:
            raise MissingCapability(
                f"The broker {can.name} takes bodies of {can.body_bytes_max} bytes, payloads may have {BODY_BYTES_MAX}."
            )


def _leave_to_relay(rows: Sequence[StoredRow]) -> None:
    """Without a broker: those that coordinate sweep what stands in the outbox."""


class _Running:
    """The parts of a started app, in the order in which they start; they stop in reverse."""

    def __init__(self, app: App) -> None:
        self._app = app
        self.spawner = app.make_spawner()
        self.database = app.make_database(self.spawner)
        self.broker = app.make_broker(self.spawner, self.database)
        self.client: Client | None = None
        self.outbox: Outbox | None = None
        self.publisher: CommandPublisher | None = None
        self.relay: Relay | None = None
        self.coordinator: Coordinator | None = None
        self.services: list[Shell] = []
        self._prepared = False
        self._connected = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self._consumed: list[str] = []

    async def start(self, *, coordinator: bool, participants: bool, events: bool, broker: bool) -> None:
        """`events`: send the domain events of this database too, as coordinators do anyway."""
        self.loop = asyncio.get_running_loop()
        self._app.check_capabilities(self.broker)
        if self.database is not None:
            await self._app.prepare_database(self.database)
        self._prepared = True
        self._connected = broker
        self._consumed = self._channels(coordinator, participants)
        if broker:
            await self.broker.start()
            await self._check_channels()
        app = self._app
        if self.database is not None and (app.registry.served() or app.topics or app.inboxes):
            self._make_outbox(self.database)
        if self.database is not None and self._app.registry.served():
            self._make_coordinator(self.database, coordinator)
        if broker and self._app.topics:
            await self.broker.declare([Channel(topic) for topic in sorted(self._app.topics)])
        if participants:
            # before the coordinator, so that its first commands meet consumers
            self.services = self._make_services()
            for service in self.services:
                await service.start()
        if coordinator and self.coordinator is not None:
            await self.coordinator.start()
        else:
            self.coordinator = None
        if self.relay is not None and (self.coordinator is not None or events):
            self.relay.start()
        else:
            self.relay = None

    async def _check_channels(self) -> None:
        """Look at the channels that are there, before anything is sent. Raises TopologyMismatch in production mode."""
        if not isinstance(self.broker, Checked) or not self.broker.lets_pass:
            return
        found = [
            each
            for each in await self.broker.check(self._app.channels())
            if each.severity is not Severity.NOTE
        ]
        refused = [each for each in found if each.severity is Severity.REFUSE]
        if refused and self._app.settings.production:
            told = "; ".join(f"[{each.code}] {each.text}: {each.fix}" for each in refused)
            raise TopologyMismatch(f"Production mode refuses what is there on the broker: {told}.")
        for each in found:
            log.warning("[%s] %s: %s", each.code, each.text, each.fix)

    def too_slow(self) -> SagaError:
        """Return the error of a start that took too long, by what it waited for."""
        if self._prepared:
            return BrokerUnavailable(
                f"The broker {self.broker.capabilities.name} answers too slowly to start on; try again."
            )
        place = "" if self.database is None else f" at {self.database.place}"
        return StorageUnavailable(f"The database{place} answers too slowly to start on; try again.")

    def _make_outbox(self, database: Database) -> None:
        app = self._app
        self.publisher = self._make_publisher(database)
        if app.topics:
            self.outbox = Outbox(
                SqlEventStore(database, app.namespace, queued=app.queued),
                app.topics,
                namespace=app.namespace,
                clock=app._clock,
                ids=app._ids,
                after_commit=self._wake_after,
            )

    def _make_coordinator(self, database: Database, coordinates: bool) -> None:
        app, publisher = self._app, self.publisher
        assert publisher is not None
        ports: dict[str, Any] = {"clock": app._clock, "spawner": self.spawner}
        recent, lane = RecentInstances(app._clock), Lane()
        store = SqlCoordinatorStore(database, app.namespace, recent, queued=app.queued)
        publish = publisher.publish if self._connected else _leave_to_relay
        verbs = Verbs(
            app.registry,
            store,
            namespace=app.namespace,
            clock=app._clock,
            ids=app._ids,
            publish=publish,
            on_closed=lambda runs: client.closed(runs),
        )
        self.client = client = Client(
            app.registry,
            SqlClientStore(database, app.namespace, recent if coordinates else None, queued=app.queued),
            namespace=app.namespace,
            ids=app._ids,
            publish=publish,
            after_commit=self._wake_after,
            verbs=verbs,
            operators=SqlOperatorStore(database, app.namespace),
            parking=SqlParkingStore(database, app.namespace),
            resend=self._resend,
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

    def _make_publisher(self, database: Database) -> CommandPublisher:
        """Return what sends committed commands; with the queue in the same database there is nothing to send."""
        app = self._app
        if app.queued and isinstance(self.broker, DatabaseBroker):
            return QueuedRows(self.broker.wake)
        ports: dict[str, Any] = {"clock": app._clock, "spawner": self.spawner}
        outbox = SqlOutboxStore(database, app.namespace)
        publisher = DirectPublisher(self.broker, outbox, **ports)
        self.relay = Relay(self.broker, outbox, publisher, ids=app._ids, **ports)
        return publisher

    def _wake(self) -> None:
        """Rows became visible that nobody publishes from memory."""
        if self.relay is not None:
            self.relay.wake()
        elif isinstance(self.broker, DatabaseBroker):
            self.broker.wake()

    def _wake_after(self, session: Any) -> None:
        """P19: what the event says of the outcome is not trusted; whoever is woken reads what is really committed.

        What a connection commits, without a session, is found by the next sweep.
        """
        from sqlalchemy import event
        from sqlalchemy.orm import Session

        def committed(sync: Any) -> None:
            # a savepoint's release is told as a commit too, and the caller may go on after it
            if sync.info[self] and not sync.in_nested_transaction():
                sync.info[self] = False
                self._wake_soon()

        plain = getattr(session, "registry", lambda: session)()  # a scoped session's own
        sync = getattr(plain, "sync_session", plain)
        if not isinstance(sync, Session):
            return
        if self not in sync.info:
            event.listen(sync, "after_commit", committed)
        sync.info[self] = True

    def _wake_soon(self) -> None:
        """Wake from whatever thread the commit was made in."""
        assert self.loop is not None
        with suppress(RuntimeError):  # the loop was closed meanwhile; rows are found by those that still run
            self.loop.call_soon_threadsafe(self._wake)

    def _channels(self, coordinator: bool, participants: bool) -> list[str]:
        app = self._app
        queues = {
            activity.queue
            for participant in app.participants
            for activity in participant.activities.values()
            if activity.handler is not None
        }
        replies = [replies_channel(app.namespace)] if coordinator else []
        topics = {topic for inbox in app.inboxes for topic, _ in inbox.consumers}
        consumed = [*(commands_channel(app.namespace, queue) for queue in sorted(queues)), *sorted(topics)]
        return [*replies, *(consumed if participants else ())]

    async def health(self) -> Health:
        """Ask database and broker."""
        database = self.database is None or bool(await self._answers(self.database.ping()))
        asked = [self.broker.status(channel) for channel in self._consumed]
        states = [await self._answers(status) for status in asked]
        return Health(
            database,
            all(state is not None for state in states),
            all(state is not None and state.consumers > 0 for state in states),
        )

    async def _answers(self, question: Coroutine[Any, Any, T]) -> T | None:
        """Return the answer, or None if there is none in time or an error instead."""
        try:
            return await within(HEALTH_SECONDS, question, spawner=self.spawner, name="saga-health")
        except Exception as error:
            log.warning("health: %s", type(error).__name__)
            return None

    async def _resend(self, row: ParkedRow) -> str:
        if not self._connected:
            self._app.check_links(database=False)
            await self.broker.start()
            self._connected = True
        (sent,) = self.broker.publish(
            [OutMessage(row.channel, row.body, row.content_type, headers=row.headers)]
        )
        return str(await sent)

    def _make_parking(self) -> Parking:
        store = SqlParkingStore(self.database, self._app.namespace) if self.database is not None else None
        return Parking(store, self.broker, clock=self._app._clock, ids=self._app._ids)

    def _make_services(self) -> list[Shell]:
        """Return what runs handlers here: participants, and inboxes beside them on the same connections."""
        app, database = self._app, self.database
        ports: dict[str, Any] = {
            "namespace": app.namespace,
            "clock": app._clock,
            "ids": app._ids,
            "spawner": self.spawner,
            "concurrency": app.settings.concurrency,
        }
        store = parking = None
        if database is not None:
            store = SqlParticipantStore(database, app.namespace, transactions_max=app.settings.pool_size)
            parking = SqlParkingStore(database, app.namespace)
        services: list[Shell] = []
        if app.participants:
            services.append(ParticipantService(app.participants, self.broker, store, parking, **ports))
        if app.inboxes and database is not None and store is not None and parking is not None:
            events = SqlEventStore(database, app.namespace, queued=app.queued)
            services.append(InboxService(app.inboxes, self.broker, store.inbox(), events, parking, **ports))
        return services

    async def stop(self, grace: timedelta) -> None:
        clock = self._app._clock
        ends = clock.monotonic() + grace.total_seconds()
        if self.coordinator is not None:
            await self.coordinator.stop(grace)
        for service in self.services:
            await service.stop(timedelta(seconds=max(ends - clock.monotonic(), 0.0)))
        if self.relay is not None:
            await self.relay.stop()
        if self.publisher is not None:
            await self.publisher.close()
        await self.broker.close()
        if self.database is not None:
            await self.database.dispose()
        await self.spawner.close()
