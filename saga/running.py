"""The parts of a started app: where adapters meet the core, in the order in which they start; they stop in reverse."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Final, NamedTuple, TypeVar

from saga.batcher import Lane
from saga.brokers.base import Broker, Channel, Checked, OutMessage, Severity
from saga.brokers.database import DatabaseBroker
from saga.client import Client
from saga.clock import Clock, Ids, TaskSpawner, within
from saga.coordinator.service import Coordinator
from saga.coordinator.verbs import Verbs
from saga.declared import Declared
from saga.errors import (
    BrokerUnavailable,
    SagaError,
    StorageUnavailable,
    TopologyMismatch,
)
from saga.housekeeping import Housekeeping
from saga.inbox.service import InboxService
from saga.messages import commands_channel, replies_channel
from saga.outbox.events import Outbox
from saga.outbox.parking import Parking
from saga.outbox.publisher import CommandPublisher, DirectPublisher
from saga.outbox.queued import QueuedRows
from saga.outbox.relay import Relay
from saga.participant.service import ParticipantService
from saga.participant.shell import Shell
from saga.patience import Patience
from saga.retention.ages import Horizon, check_barrier_age
from saga.retention.archive import Archive
from saga.storage.base import ParkedRow, StoredRow
from saga.storage.sqlalchemy.coordinator import SqlClientStore, SqlCoordinatorStore
from saga.storage.sqlalchemy.database import Database
from saga.storage.sqlalchemy.events import SqlEventStore
from saga.storage.sqlalchemy.operators import SqlOperatorStore
from saga.storage.sqlalchemy.outbox import SqlOutboxStore
from saga.storage.sqlalchemy.parking import SqlParkingStore
from saga.storage.sqlalchemy.participant import SqlParticipantStore
from saga.storage.sqlalchemy.recent import RecentInstances
from saga.storage.sqlalchemy.writer import handler_writes_to

log: Final[logging.Logger] = logging.getLogger("saga.app")

HEALTH_SECONDS: Final = 2.0
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


def _leave_to_relay(rows: Sequence[StoredRow]) -> None:
    """Without a broker: those that coordinate sweep what stands in the outbox."""


class Running:
    """The parts of a started app, in the order in which they start; they stop in reverse."""

    def __init__(self, app: Declared, *, clock: Clock, ids: Ids, archive: Archive | None) -> None:
        self._app = app
        self._clock = clock
        self._ids = ids
        self.spawner: TaskSpawner = app.make_spawner()
        self.database: Database | None = app.make_database(self.spawner)
        self.broker: Broker = app.make_broker(self.spawner, self.database)
        self.client: Client | None = None
        self.outbox: Outbox | None = None
        self.publisher: CommandPublisher | None = None
        self.relay: Relay | None = None
        self.coordinator: Coordinator | None = None
        self.services: list[Shell] = []
        self.keeping: Housekeeping | None = None
        if self.database is not None:
            self.keeping = Housekeeping(
                app, self.database, self.spawner, clock=clock, ids=ids, archive=archive
            )
        self._prepared = False
        self._connected = False
        self.loop: asyncio.AbstractEventLoop | None = None
        self._consumed: list[str] = []

    async def start(self, *, coordinator: bool, participants: bool, events: bool, broker: bool) -> None:
        """`events`: send the domain events of this database too, as coordinators do anyway."""
        self.loop = asyncio.get_running_loop()
        self._app.check_capabilities(self.broker)
        if self.database is not None:
            if participants:
                given = self._app.settings
                check_barrier_age(given.barrier_retention, self.broker.capabilities, given.redrive)
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
            await self._start_services()
        if coordinator and self.coordinator is not None:
            await self.coordinator.start()
            if self.keeping is not None:
                self.keeping.keep_runs()
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
                clock=self._clock,
                ids=self._ids,
                after_commit=self._wake_after,
            )

    def _make_coordinator(self, database: Database, coordinates: bool) -> None:
        app, publisher = self._app, self.publisher
        assert publisher is not None
        ports: dict[str, Any] = {"clock": self._clock, "spawner": self.spawner}
        recent, lane = RecentInstances(self._clock), Lane()
        store = SqlCoordinatorStore(database, app.namespace, recent, queued=app.queued)
        publish = publisher.publish if self._connected else _leave_to_relay
        verbs = Verbs(
            app.registry,
            store,
            namespace=app.namespace,
            clock=self._clock,
            ids=self._ids,
            publish=publish,
            on_closed=lambda runs: client.closed(runs),
        )
        self.client = client = Client(
            app.registry,
            SqlClientStore(database, app.namespace, recent if coordinates else None, queued=app.queued),
            namespace=app.namespace,
            ids=self._ids,
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
            ids=self._ids,
            on_closed=client.closed,
            lane=lane,
            **ports,
        )

    def _make_publisher(self, database: Database) -> CommandPublisher:
        """Return what sends committed commands; with the queue in the same database there is nothing to send."""
        app = self._app
        if app.queued and isinstance(self.broker, DatabaseBroker):
            return QueuedRows(self.broker.wake)
        ports: dict[str, Any] = {"clock": self._clock, "spawner": self.spawner}
        outbox = SqlOutboxStore(database, app.namespace)
        publisher = DirectPublisher(self.broker, outbox, **ports)
        self.relay = Relay(self.broker, outbox, publisher, ids=self._ids, **ports)
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
        consumed = [
            *(commands_channel(app.namespace, queue) for queue in sorted(queues)),
            *sorted(app.consumed()),
        ]
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
        return Parking(store, self.broker, Patience(self._clock, self._ids))

    def _make_services(self, horizon: Horizon | None) -> list[Shell]:
        """Return what runs handlers here: participants, and inboxes beside them on the same connections."""
        app, database = self._app, self.database
        ports: dict[str, Any] = {
            "namespace": app.namespace,
            "clock": self._clock,
            "ids": self._ids,
            "spawner": self.spawner,
            "concurrency": app.settings.concurrency,
        }
        store = parking = None
        if database is not None:
            store = SqlParticipantStore(database, app.namespace, transactions_max=app.settings.pool_size)
            parking = SqlParkingStore(database, app.namespace)
        services: list[Shell] = []
        if app.participants:
            services.append(
                ParticipantService(app.participants, self.broker, store, parking, horizon=horizon, **ports)
            )
        if app.inboxes and database is not None and store is not None and parking is not None:
            events = SqlEventStore(database, app.namespace, queued=app.queued)
            services.append(
                InboxService(
                    app.inboxes, self.broker, store.inbox(), events, parking, horizon=horizon, **ports
                )
            )
        return services

    async def _start_services(self) -> None:
        horizon = None
        if self.keeping is not None:
            horizon = await self.keeping.horizon(known=bool(self._app.participants))
        self.services = self._make_services(horizon)
        for service in self.services:
            await service.start()
        if self.services and self.keeping is not None:
            self.keeping.keep_participants()

    async def stop(self, grace: timedelta) -> None:
        clock = self._clock
        ends = clock.monotonic() + grace.total_seconds()
        if self.keeping is not None:
            await self.keeping.stop()
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
