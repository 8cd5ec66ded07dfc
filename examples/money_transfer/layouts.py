"""Where the scenarios play: one process on one SQLite file, or a service each, with a broker or with a database only.

A layout makes the databases, keeps the processes up, plays one transfer at a time, and starts again whatever SIGKILL
ended, without the fault that did it. The runner sees no difference between them.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Final, Self
from urllib.parse import urlsplit

from sqlalchemy import Connection, Table, insert
from sqlalchemy.ext.asyncio import create_async_engine

from examples.money_transfer.apps import SCHEMAS
from examples.money_transfer.books import Auditor, PostgresAuditor, SqliteAuditor
from examples.money_transfer.processes import Child, DemoError, within
from examples.money_transfer.scenarios import OPENING
from examples.money_transfer.transfer import Transfer, accounts, ledger, metadata, notifications
from saga.messages import commands_channel, parking_channel, replies_channel
from saga.storage.sqlalchemy import schema as schemas
from saga.storage.sqlalchemy.database import async_url

STAGE: Final = "examples.money_transfer.stage"
STARTER: Final = "starter"
PLAY_SECONDS_MAX: Final = 45.0
CONNECT_SECONDS_MAX: Final = 10.0
LATE_SECONDS_MAX: Final = 5.0
"""How long a point that is passed after the end, an ack for instance, may take to fire."""

Environment = Mapping[str, str]
Opening = Mapping[str, Mapping[str, int]]
NO_FAULTS: Final[Mapping[str, Environment]] = {}


@dataclass
class Played:
    """What one transfer came to: the starter's report, and how often each process was killed."""

    report: str
    deaths: Counter[str]


class Layout(ABC):
    """The databases and processes of one form of the demo, alive between `__enter__` and `__exit__`."""

    title: ClassVar[str]
    makes = ""
    """What there is on servers for as long as it lives, for people."""
    services: ClassVar[Sequence[str]]
    """The processes that run all the time, beside the starter."""
    auditor: Auditor

    def __init__(self, sabotage: str = "", *, opening: Opening = OPENING, stage: str = STAGE) -> None:
        """`stage` is the module of the processes' apps, `opening` what the banks begin with."""
        self._opening = opening
        self._stage = stage
        self._running: dict[str, Child] = {}
        self._faults: dict[str, Environment] = {}
        self._order = ""
        self._deaths: Counter[str] = Counter()
        self.environment: dict[str, str] = {"DEMO_SABOTAGE": sabotage}
        """What every process gets: where the databases and the broker are."""
        self._stack = ExitStack()
        self.directory = Path()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="money-transfer-")))
            self._make(stack)
            stack.callback(self._end_all)
            for name in self.services:
                self.launch(name)
            for child in self._running.values():
                child.wait_until_ready()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @abstractmethod
    def _make(self, stack: ExitStack) -> None:
        """Make databases and accounts; give the stack what is to be removed."""

    @abstractmethod
    def _arguments(self, name: str, order: str) -> Sequence[str]:
        """Return the arguments of a process; the starter's begins the order and waits for its end."""

    @abstractmethod
    def home(self, step: str) -> str:
        """Return the process that does a step."""

    @abstractmethod
    def victims(self, random: Random) -> Sequence[str]:
        """Return the processes to be killed, one after the other."""

    def play(self, order: Transfer, faults: Mapping[str, Environment]) -> Played:
        """Play one transfer to its end, each process with the environment that `faults` gives it and no other."""
        self._deaths.clear()
        for name in self.services:
            wanted = faults.get(name, {})
            if wanted != self._faults[name]:
                self._running[name].end()
                self.launch(name, wanted)
                self._running[name].wait_until_ready()
        starter = self.launch(STARTER, faults.get(STARTER, {}), order.model_dump_json())
        for _ in within(PLAY_SECONDS_MAX):
            self.raise_the_dead()
            starter = self._running[STARTER]
            if starter.status is not None and not starter.killed:
                break
        if starter.status != 0:
            raise starter.failure(
                "failed" if starter.status else f"did not end within {PLAY_SECONDS_MAX:g} s"
            )
        self._wait_for_late_deaths(faults)
        return Played(starter.output, Counter(self._deaths))

    def _wait_for_late_deaths(self, faults: Mapping[str, Environment]) -> None:
        armed = [name for name in self.services if "SAGA_FAIL" in faults.get(name, {})]
        for _ in within(LATE_SECONDS_MAX if armed else 0.0):
            if self.raise_the_dead().total():
                break
        for name in armed:
            self._running[name].wait_until_ready()

    def raise_the_dead(self, faults: Mapping[str, Environment] = NO_FAULTS) -> Counter[str]:
        """Start again what SIGKILL ended, without its fault or with a new one from `faults`.

        Returns how often each process was killed in this play. Raises DemoError if one ended in another way, unless
        it is the starter.
        """
        for name, child in list(self._running.items()):
            if child.killed:
                self._deaths[name] += 1
                self.launch(name, faults.get(name), self._order)
            elif child.status is not None and name != STARTER:
                raise child.failure("ended by itself")
        return self._deaths

    def launch(self, name: str, environment: Environment | None = None, order: str = "") -> Child:
        """Start a process, with more in its environment than all have."""
        self._faults[name] = dict(environment or {})
        if name == STARTER:
            self._order = order
        arguments = self._arguments(name, self._order)
        settings = {**self.environment, **self._faults[name]}
        self._running[name] = child = Child(name, arguments, settings, self.directory)
        return child

    def kill(self, name: str) -> None:
        """Kill a process at once."""
        self._running[name].kill()

    def _end_all(self) -> None:
        for child in self._running.values():
            child.kill()


class Embedded(Layout):
    """Everything in one process: it starts the transfer, coordinates it and does its steps."""

    title = "embedded: one process, one SQLite file, the in-process broker"
    services: ClassVar[Sequence[str]] = ()

    def _make(self, stack: ExitStack) -> None:
        path = self.directory / "money.db"
        self.environment["DEMO_DATABASE"] = f"sqlite:///{path}"
        opening = {name: cents for bank in self._opening.values() for name, cents in bank.items()}
        asyncio.run(prepare_service(f"sqlite:///{path}", None, [accounts, ledger, notifications], opening))
        self.auditor = SqliteAuditor(path)

    def _arguments(self, name: str, order: str) -> Sequence[str]:
        return ["-m", self._stage, "embedded", order]

    def home(self, step: str) -> str:
        return STARTER

    def victims(self, random: Random) -> Sequence[str]:
        return [STARTER]


class Services(Layout):
    """Coordinator, both banks, notifier and starter as processes of their own."""

    services = tuple(SCHEMAS)

    def _arguments(self, name: str, order: str) -> Sequence[str]:
        if name == STARTER:
            return ["-m", self._stage, STARTER, order]
        role = "coordinator" if name == "coordinator" else "participant"
        return ["-m", "saga.cli", role, f"{self._stage}:{name}"]

    def home(self, step: str) -> str:
        return {"withdraw": "savings", "deposit": "giro", "notify": "notifier"}[step]

    def victims(self, random: Random) -> Sequence[str]:
        return ["coordinator", random.choice(["savings", "giro", "notifier"])]


class SharedFile(Services):
    """All of them on one SQLite file, which is their broker too."""

    title = "sqlite-shared: coordinator, two banks, notifier and starter as processes on one SQLite file"

    def _make(self, stack: ExitStack) -> None:
        path = self.directory / "money.db"
        url = f"sqlite:///{path}"
        for service in SCHEMAS:
            self.environment[f"MONEY_TRANSFER_{service.upper()}_DATABASE"] = url
        self.environment["MONEY_TRANSFER_BROKER"] = "database://"
        opening = {name: cents for bank in self._opening.values() for name, cents in bank.items()}
        asyncio.run(prepare_service(url, None, [accounts, ledger, notifications], opening))
        self.auditor = SqliteAuditor(path)


class Servers(Services):
    """Each with its role and schema in one PostgreSQL database, or with a database of its own."""

    title = "postgres-rabbitmq: coordinator, two banks, notifier and starter as processes of their own"
    needs: ClassVar[Sequence[str]] = ("SAGA_DEMO_POSTGRES_URL", "SAGA_DEMO_RABBITMQ_URL")
    _tables: ClassVar[Mapping[str, Sequence[Table]]] = {
        "savings": [accounts, ledger],
        "giro": [accounts, ledger],
        "notifier": [notifications],
    }

    def __init__(
        self,
        sabotage: str = "",
        *,
        opening: Opening = OPENING,
        stage: str = STAGE,
        database_each: bool = False,
    ) -> None:
        """`database_each` gives every service a database of its own, where there is no snapshot of all of them."""
        super().__init__(sabotage, opening=opening, stage=stage)
        self._database_each = database_each
        for name in self.needs:
            if name not in os.environ:
                stack = self.title.partition(":")[0]
                raise DemoError(f"{name} is not set; `make demo STACK={stack}` sets it")

    def _make(self, stack: ExitStack) -> None:
        """Roles first, so that they go last: a database goes with all that they own in it."""
        from asyncpg import InsufficientPrivilegeError

        from devservices import Origin, Postgres, Unavailable

        self._token = secrets.token_hex(4)
        name = f"saga_demo_{self._token}"
        self.makes = f"database and roles {name}*"
        try:
            server = Postgres(os.environ["SAGA_DEMO_POSTGRES_URL"], Origin.URL)
            roles = {service: self._role(server, f"{name}_{service}", stack) for service in SCHEMAS}
            shared = None if self._database_each else self._database(server, name, stack)
            places = {each: shared or self._database(server, f"{name}_{each}", stack) for each in SCHEMAS}
            for service, schema in SCHEMAS.items():
                role, password = roles[service]
                server.create_schema(places[service], schema, owner=role)
                database = places[service].partition("?")[0].rpartition("/")[2]
                url = server.database_url(database, role=role, password=password)
                tables, opening = self._tables.get(service, ()), self._opening.get(service, {})
                asyncio.run(prepare_service(url, schema, tables, opening))
                self.environment[f"MONEY_TRANSFER_{service.upper()}_DATABASE"] = url
        except Unavailable as error:
            raise DemoError(str(error)) from None
        except InsufficientPrivilegeError as error:
            raise DemoError(f"the database's role must have CREATEDB and CREATEROLE: {error}") from None
        self.environment["MONEY_TRANSFER_BROKER"] = self._broker(stack)
        banks = [(places[bank], SCHEMAS[bank]) for bank in ("savings", "giro")]
        self.auditor = PostgresAuditor(banks, (places["notifier"], SCHEMAS["notifier"]))

    @staticmethod
    def _role(server: Any, name: str, stack: ExitStack) -> tuple[str, str]:
        role: tuple[str, str] = server.create_role(name)
        stack.callback(server.drop_role, name)
        return role

    @staticmethod
    def _database(server: Any, name: str, stack: ExitStack) -> str:
        url: str = server.create_database(name)
        stack.callback(server.drop_database, name)
        return url

    def _broker(self, stack: ExitStack) -> str:
        """Return the broker's address, with a namespace whose queues are removed at the end."""
        from aio_pika.exceptions import AMQPException

        url = os.environ["SAGA_DEMO_RABBITMQ_URL"]
        self.environment["DEMO_NAMESPACE"] = namespace = f"demo-{self._token}"
        self.makes += f", queues saga.{namespace}.*"
        try:
            asyncio.run(_delete_queues(url, namespace))  # there are none yet: it shows that the address works
        except (OSError, AMQPException) as error:
            raise DemoError(f"RabbitMQ cannot be used: {type(error).__name__}") from None
        stack.callback(lambda: asyncio.run(_delete_queues(url, namespace)))
        return url


class OnKafka(Servers):
    """The same on a log: topics take the place of queues."""

    title = "postgres-kafka: coordinator, two banks, notifier and starter as processes of their own, on Kafka"
    needs = ("SAGA_DEMO_POSTGRES_URL", "SAGA_DEMO_KAFKA_URL")

    def _broker(self, stack: ExitStack) -> str:
        """Return the broker's address, with a namespace whose topics are removed at the end."""
        from aiokafka.errors import KafkaError

        url = os.environ["SAGA_DEMO_KAFKA_URL"]
        self.environment["DEMO_NAMESPACE"] = namespace = f"demo-{self._token}"
        self.makes += f", topics saga.{namespace}.*"
        try:
            asyncio.run(_delete_topics(url, namespace))  # there are none yet: it shows that the address works
        except (OSError, KafkaError) as error:
            raise DemoError(f"Kafka cannot be used: {type(error).__name__}") from None
        stack.callback(lambda: asyncio.run(_delete_topics(url, namespace)))
        return url


class DatabaseOnly(Servers):
    """Without a broker: the queues are tables of the coordinator's schema, and go with it."""

    title = "postgres: coordinator, two banks, notifier and starter as processes, PostgreSQL is the broker"
    needs = ("SAGA_DEMO_POSTGRES_URL",)

    def _broker(self, stack: ExitStack) -> str:
        coordinator = self.environment["MONEY_TRANSFER_COORDINATOR_DATABASE"]
        return f"{coordinator}{'&' if '?' in coordinator else '?'}schema={SCHEMAS['coordinator']}"


LAYOUTS: Final[Mapping[str, type[Layout]]] = {
    "sqlite": Embedded,
    "sqlite-shared": SharedFile,
    "postgres": DatabaseOnly,
    "postgres-rabbitmq": Servers,
    "postgres-kafka": OnKafka,
}


def on_servers(database: str, broker: str) -> type[Servers]:
    """Return the layout on servers that are there already; without a broker the database is one.

    Raises DemoError for addresses that are none; neither is shown, because they may hold passwords.
    """
    if not _is_address(database, "postgresql", "postgres"):
        raise DemoError(
            "the database's address must be of the form postgresql://user:password@host:port/name"
        )
    os.environ["SAGA_DEMO_POSTGRES_URL"] = database
    if broker in ("", database, "database://"):
        return DatabaseOnly
    if broker.startswith("kafka://"):
        os.environ["SAGA_DEMO_KAFKA_URL"] = broker
        return OnKafka
    if not _is_address(broker, "amqp", "amqps"):
        raise DemoError(
            "the broker's address must be of the form amqp://user:password@host:port/ or kafka://host:port, or left out"
        )
    os.environ["SAGA_DEMO_RABBITMQ_URL"] = broker
    return Servers


def _is_address(url: str, *schemes: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme.partition("+")[0] in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:  # its port is no number; it may be half of a password
        return False


async def prepare_service(
    url: str, schema: str | None, tables: Sequence[Table], opening: Mapping[str, int]
) -> None:
    """Make a service's tables, ours and its own, as the role of the service, and open its accounts."""

    def make(connection: Connection) -> None:
        if schema is not None:  # the embedded app makes ours by itself
            schemas.upgrade(connection, schema=schema)
        metadata.create_all(connection, tables=tables)
        if opening:
            rows = [{"id": name, "balance": cents} for name, cents in opening.items()]
            connection.execute(insert(accounts), rows)

    engine = create_async_engine(async_url(url))
    try:
        async with engine.begin() as connection:
            await connection.run_sync(make)
    finally:
        await engine.dispose()


async def _delete_queues(url: str, namespace: str) -> None:
    """Leave the broker as it was: the queues of one demo are of no use to the next."""
    import aio_pika

    async with await aio_pika.connect(url, timeout=CONNECT_SECONDS_MAX) as connection:
        channel = await connection.channel()
        for queue in _channels(namespace):
            await channel.queue_delete(queue, timeout=CONNECT_SECONDS_MAX)


async def _delete_topics(url: str, namespace: str) -> None:
    """The same for topics; what their groups have committed goes with them."""
    from aiokafka.admin import AIOKafkaAdminClient

    client = AIOKafkaAdminClient(bootstrap_servers=url.removeprefix("kafka://"))
    try:
        await client.start()
        await client.delete_topics(_channels(namespace))
    finally:
        await client.close()


def _channels(namespace: str) -> list[str]:
    """Return every channel of a namespace, each with its parking channel."""
    work = [replies_channel(namespace), *(commands_channel(namespace, each) for each in SCHEMAS)]
    return [*work, *map(parking_channel, work)]
