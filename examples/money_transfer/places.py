"""What a layout on servers is made of: a kind of database for the services, and what carries their messages.

Everything that is made here is removed at the end, whichever kind it is of.
"""

from __future__ import annotations

import asyncio
import logging
import os
from abc import ABC, abstractmethod
from contextlib import ExitStack
from typing import ClassVar, Final

from examples.money_transfer.apps import SCHEMAS
from examples.money_transfer.books import ServerAuditor
from examples.money_transfer.processes import DemoError
from saga.messages import commands_channel, parking_channel, replies_channel

CONNECT_SECONDS_MAX: Final = 10.0
BOOKS: Final = ("savings", "giro", "notifier")
"""The services whose books are read."""


class Databases(ABC):
    """A place for each service on one server, and a log-in that may go nowhere else."""

    name: ClassVar[str]
    title: ClassVar[str]
    variable: ClassVar[str]
    """Where in the environment the server's address is."""
    made: ClassVar[str]
    """What is made there, for people."""

    def __init__(self, name: str, stack: ExitStack, *, database_each: bool) -> None:
        """`name` begins the names of all that is made."""
        self._name = name
        self._stack = stack
        self._each = database_each

    @abstractmethod
    def make(self) -> dict[str, str]:
        """Make them; return the address of each service's. Raises DemoError if the server cannot be used."""

    @abstractmethod
    def auditor(self) -> ServerAuditor:
        """Return who reads the books, once they are made."""

    def queues(self, coordinator: str) -> str:
        """Return the address of the queues that are tables of the coordinator's database."""
        return coordinator


class OnPostgres(Databases):
    """A role and a schema for each service, in one database or in one each."""

    name = "postgres"
    title = "PostgreSQL"
    variable = "SAGA_DEMO_POSTGRES_URL"
    made = "database and roles"

    def make(self) -> dict[str, str]:
        """Roles first, so that they go last: a database goes with all that they own in it."""
        from asyncpg import InsufficientPrivilegeError

        from devservices import Origin, Postgres, Unavailable

        try:
            self._server = Postgres(os.environ[self.variable], Origin.URL)
            roles = {service: self._role(f"{self._name}_{service}") for service in SCHEMAS}
            shared = None if self._each else self._database(self._name)
            self._places = {each: shared or self._database(f"{self._name}_{each}") for each in SCHEMAS}
            return {service: self._service(service, *roles[service]) for service in SCHEMAS}
        except Unavailable as error:
            raise DemoError(str(error)) from None
        except InsufficientPrivilegeError as error:
            raise DemoError(f"the database's role must have CREATEDB and CREATEROLE: {error}") from None

    def _role(self, name: str) -> tuple[str, str]:
        role = self._server.create_role(name)
        self._stack.callback(self._server.drop_role, name)
        return role

    def _database(self, name: str) -> str:
        url = self._server.create_database(name)
        self._stack.callback(self._server.drop_database, name)
        return url

    def _service(self, service: str, role: str, password: str) -> str:
        place = self._places[service]
        self._server.create_schema(place, SCHEMAS[service], owner=role)
        database = place.partition("?")[0].rpartition("/")[2]
        return self._server.database_url(database, role=role, password=password)

    def auditor(self) -> ServerAuditor:
        savings, giro, notifier = ((self._places[each], SCHEMAS[each]) for each in BOOKS)
        return ServerAuditor([savings, giro], notifier)

    def queues(self, coordinator: str) -> str:
        return f"{coordinator}{'&' if '?' in coordinator else '?'}schema={SCHEMAS['coordinator']}"


class OnMariaDb(Databases):
    """A user and a database for each service: what is a schema elsewhere is a database there."""

    name = "mariadb"
    title = "MariaDB"
    variable = "SAGA_DEMO_MARIADB_URL"
    made = "databases and users"

    def make(self) -> dict[str, str]:
        from pymysql import MySQLError

        from devservices import MariaDb, MySql, Origin, Unavailable

        logging.getLogger("asyncmy").setLevel(logging.ERROR)  # it tells that keys have no names there
        url = os.environ[self.variable]
        try:
            self._server = (MySql if url.startswith("mysql") else MariaDb)(url, Origin.URL)
            return {service: self._service(f"{self._name}_{service}") for service in SCHEMAS}
        except Unavailable as error:
            raise DemoError(str(error)) from None
        except MySQLError as error:
            raise DemoError(f"the user must be able to make databases and users: {error.args[0]}") from None

    def _service(self, name: str) -> str:
        self._server.create_database(name)
        self._stack.callback(self._server.drop_database, name)
        password = self._server.create_user(name, name)
        self._stack.callback(self._server.drop_user, name)
        return self._server.database_url(name, user=name, password=password)

    def auditor(self) -> ServerAuditor:
        savings, giro, notifier = ((self._server.url, f"{self._name}_{each}") for each in BOOKS)
        return ServerAuditor([savings, giro], notifier)


class Channels(ABC):
    """What carries messages: the channels of one demo at a broker, removed at its end."""

    name: ClassVar[str]
    title: ClassVar[str]
    variable: ClassVar[str]
    """Where in the environment the broker's address is."""
    made: ClassVar[str]

    def __init__(self, namespace: str, stack: ExitStack) -> None:
        self._namespace = namespace
        self._stack = stack

    def make(self) -> str:
        """Return the broker's address; the services declare their channels. Raises DemoError if it cannot be used."""
        url = os.environ[self.variable]
        try:
            asyncio.run(self._delete(url))  # there are none yet: it shows that the address works
        except (OSError, self._failure()) as error:
            raise DemoError(f"{self.title} cannot be used: {type(error).__name__}") from None
        self._stack.callback(lambda: asyncio.run(self._delete(url)))
        return url

    def _names(self) -> list[str]:
        """Return every channel of the namespace, each with its parking channel."""
        work = [
            replies_channel(self._namespace),
            *(commands_channel(self._namespace, each) for each in SCHEMAS),
        ]
        return [*work, *map(parking_channel, work)]

    @abstractmethod
    def _failure(self) -> type[Exception]:
        """Return what the driver raises."""

    @abstractmethod
    async def _delete(self, url: str) -> None:
        """Leave the broker as it was: the channels of one demo are of no use to the next."""


class Queues(Channels):
    """RabbitMQ's."""

    name = "rabbitmq"
    title = "RabbitMQ"
    variable = "SAGA_DEMO_RABBITMQ_URL"
    made = "queues"

    def _failure(self) -> type[Exception]:
        from aio_pika.exceptions import AMQPException

        return AMQPException

    async def _delete(self, url: str) -> None:
        import aio_pika

        async with await aio_pika.connect(url, timeout=CONNECT_SECONDS_MAX) as connection:
            channel = await connection.channel()
            for queue in self._names():
                await channel.queue_delete(queue, timeout=CONNECT_SECONDS_MAX)


class Topics(Channels):
    """Kafka's; what their groups have committed goes with them."""

    name = "kafka"
    title = "Kafka"
    variable = "SAGA_DEMO_KAFKA_URL"
    made = "topics"

    def _failure(self) -> type[Exception]:
        from aiokafka.errors import KafkaError

        failure: type[Exception] = KafkaError
        return failure

    async def _delete(self, url: str) -> None:
        from aiokafka.admin import AIOKafkaAdminClient

        client = AIOKafkaAdminClient(bootstrap_servers=url.removeprefix("kafka://"))
        try:
            await client.start()
            await client.delete_topics(self._names())
        finally:
            await client.close()
