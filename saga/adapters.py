"""Which broker an address means, and whether its queues are in the app's own database: part of the composition root."""

from __future__ import annotations

from dataclasses import fields
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, cast

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from saga.brokers.base import Broker, Capabilities
from saga.brokers.database import DATABASE, DatabaseBroker
from saga.clock import Clock, Ids, Spawner
from saga.errors import ConfigurationError
from saga.storage.queue import Bell, QueueStore
from saga.storage.sqlalchemy import schema as schemas
from saga.storage.sqlalchemy.bells import FileBell, NotifyBell, PollBell
from saga.storage.sqlalchemy.callers import place
from saga.storage.sqlalchemy.database import Database, async_url
from saga.storage.sqlalchemy.mysql_queue import MySQLQueueStatements
from saga.storage.sqlalchemy.outbox import SqlOutboxStore
from saga.storage.sqlalchemy.postgresql_queue import PostgreSQLQueueStatements
from saga.storage.sqlalchemy.queue import QueueStatements, SqlQueueStore

ENTRY_POINTS: Final = "saga.brokers"
"""Group in which another package names its adapter by the scheme of its addresses."""
OWN: Final = "database"
DATABASES: Final = ("mariadb", "mysql", "postgresql", "sqlite")
DUE_BATCH: Final = 1_000
QUEUE_POOL: Final = 4
"""Connections of the database broker: one listens, the others publish, claim and settle."""


def queues_in(broker: str | Broker, database: str | URL, schema: str | None) -> bool:
    """Return whether the broker's queues are tables of this database: what is committed there is on its way."""
    if not isinstance(broker, str):
        return False
    if scheme_of(broker) not in DATABASES:
        return scheme_of(broker) == OWN
    url, their_schema = split_schema(broker)
    ours = schema if url.get_backend_name() == "postgresql" else None
    return place(url) == place(async_url(database)) and their_schema == ours


def make_broker(
    given: str | Broker,
    database: Database | None,
    namespace: str = "default",
    *,
    clock: Clock,
    ids: Ids,
    spawner: Spawner,
) -> Broker:
    """Return the broker given, or the adapter of its address. `database` and `namespace` are the app's own.

    An address whose scheme is not ours is that of an adapter that another package has installed. Raises
    ConfigurationError or MissingExtra.
    """
    if not isinstance(given, str):
        return given
    ports: dict[str, Any] = {"clock": clock, "ids": ids, "spawner": spawner}
    scheme = scheme_of(given)
    if scheme == "memory":
        from saga.brokers.memory import MemoryBroker

        return MemoryBroker(**ports)
    if scheme in ("amqp", "amqps"):
        from saga.brokers.rabbitmq import RabbitMQBroker

        return RabbitMQBroker(given, **ports)
    if scheme == "kafka":
        from saga.brokers.kafka import KafkaBroker

        return KafkaBroker(given, **ports)
    if database is not None and queues_in(given, database.url, database.schema):
        outbox = SqlOutboxStore(database, namespace, queued=True)
        return DatabaseBroker(
            *queues_of(database, delayed_of=namespace), move_due=lambda: outbox.move_due(DUE_BATCH), **ports
        )
    if scheme == OWN:
        raise ConfigurationError("The broker database:// is the app's own database, and this app has none.")
    if scheme in DATABASES:
        return database_broker(given, **ports)
    if (found := _installed(scheme)) is not None:
        return cast("Broker", found.load()(given, **ports))
    raise ConfigurationError(
        f"No broker for {scheme!r}; known are memory, amqp, amqps, kafka, database, mysql, mariadb, postgresql and "
        f"sqlite, and what packages install as entry points {ENTRY_POINTS!r}."
    )


def _installed(scheme: str) -> EntryPoint | None:
    """Return the adapter that another package names for a scheme. Raises ConfigurationError if two do."""
    found = entry_points(group=ENTRY_POINTS, name=scheme)
    if len(found) > 1:
        places = ", ".join(sorted(each.value for each in found))
        raise ConfigurationError(f"Several packages have a broker for {scheme!r}: {places}. Remove one.")
    return next(iter(found), None)


def database_broker(
    address: str, *, clock: Clock, ids: Ids, spawner: Spawner, **options: Any
) -> DatabaseBroker:
    """Return a broker on the database of that address, with connections of its own.

    `?schema=` in the address says where the tables are on PostgreSQL. An SQLite file is made and upgraded at start.
    """
    url, schema = split_schema(address)
    ports: dict[str, Any] = {"clock": clock, "ids": ids, "spawner": spawner}
    database = Database(url, schema=schema, pool_size=QUEUE_POOL, **ports)
    store, bell = queues_of(database)
    return DatabaseBroker(
        store,
        bell,
        open=lambda: schemas.prepare(database),
        close=database.dispose,
        **ports,
        **options,
    )


def queues_of(database: Database, *, delayed_of: str | None = None) -> tuple[QueueStore, Bell]:
    """Return the queues of a database, and how processes on it tell each other of new messages.

    `delayed_of` is the namespace whose delayed outbox rows belong into these queues.
    """
    clock, ids = database.clock, database.ids
    if database.dialect == "sqlite":
        bell = FileBell(str(database.url.database), clock)
        return SqlQueueStore(database, QueueStatements(clock, ids, delayed_of)), bell
    if database.dialect == "mysql":
        poll = PollBell(database)
        return SqlQueueStore(database, MySQLQueueStatements(clock, ids, poll.presence, delayed_of)), poll
    notify = NotifyBell(database)
    statements = PostgreSQLQueueStatements(clock, ids, notify.presence, delayed_of)
    return SqlQueueStore(database, statements), notify


def split_schema(address: str) -> tuple[URL, str | None]:
    """Return an address without its `schema`, and that. Raises ConfigurationError, never showing a password."""
    try:
        url = make_url(address)
    except (ArgumentError, ValueError):
        return async_url(address), None  # says what is wrong with it
    schema = url.query.get("schema")
    if isinstance(schema, tuple):
        raise ConfigurationError("The broker's address names more than one schema.")
    return async_url(url.difference_update_query(["schema"])), schema


def capabilities() -> str:
    """Return what our brokers declare as the table of the page `docs/brokers.md`."""
    from saga.brokers.kafka import KafkaBroker
    from saga.brokers.memory import MEMORY
    from saga.brokers.rabbitmq import RabbitMQBroker

    declared = [
        MEMORY,
        DATABASE,
        RabbitMQBroker("amqp://localhost/").capabilities,
        KafkaBroker("kafka://localhost:9092").capabilities,
    ]
    names = [each.name for each in fields(Capabilities) if each.name != "name"]
    lines = [["", *(f"`{each.name}`" for each in declared)], ["---"] * (len(declared) + 1)]
    lines += [[f"`{name}`", *(_said(getattr(each, name)) for each in declared)] for name in names]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _said(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:,}"


def scheme_of(address: str) -> str:
    """Return what kind of broker an address is of."""
    return address.partition("://")[0].partition("+")[0]
