"""What an app is told, and what its parts are made of: configuration is read here, and checked without I/O."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from saga import adapters, links
from saga.brokers.base import Broker, Channel
from saga.clock import Clock, Ids, SystemClock, SystemIds, TaskSpawner
from saga.definition.activity import Activity, Participant, check_name
from saga.definition.builder import Saga
from saga.definition.inbox import Inbox
from saga.definition.registry import Registry
from saga.engine.model import Redrive
from saga.errors import ConfigurationError, MissingCapability
from saga.inbox.served import limit_seconds
from saga.messages import BODY_BYTES_MAX, commands_channel, parking_channel, replies_channel
from saga.participant.served import idle_in_transaction_seconds, limits
from saga.retention.archive import Archive
from saga.storage.sqlalchemy import schema
from saga.storage.sqlalchemy.database import Database

if TYPE_CHECKING:
    from saga.settings import Settings

COORDINATOR_POOL: Final = 5
"""Connections of a coordinator or a client, beside those of handlers."""


class Declared:
    """Settings, sagas, participants, inboxes and topics of one service. `App` runs it."""

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
        retention: timedelta | None = None,
        barrier_retention: timedelta | None = None,
        archive: Archive | None = None,
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
        developer's machine only, and is else warned of. Completed and compensated runs are purged `retention` after
        they closed, and given to `archive` before; rows of the participants' barrier go when their run began longer ago
        than `barrier_retention`, and rows of the inbox at that age.
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
            retention=retention,
            barrier_retention=barrier_retention,
        )
        given = self.settings
        self._archive = archive
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
        self._ids = ids or SystemIds(clock)

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
        return [
            *(Channel(name, parking_channel(name)) for name in sorted(work)),
            *(Channel(topic) for topic in sorted(self.topics | self.consumed())),
        ]

    def consumed(self) -> set[str]:
        """Return the topics that the inboxes consume."""
        return {topic for inbox in self.inboxes for topic, _ in inbox.consumers}

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
