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
from typing import ClassVar, Final, Self
from urllib.parse import urlsplit

from sqlalchemy import Connection, Table, insert
from sqlalchemy.ext.asyncio import create_async_engine

from examples.money_transfer.apps import SCHEMAS
from examples.money_transfer.books import Auditor, SqliteAuditor
from examples.money_transfer.places import Channels, Databases, OnMariaDb, OnPostgres, Queues, Topics
from examples.money_transfer.processes import Child, DemoError, within
from examples.money_transfer.scenarios import OPENING
from examples.money_transfer.transfer import Transfer, accounts, ledger, metadata, notifications
from saga.storage.sqlalchemy import schema as schemas
from saga.storage.sqlalchemy.database import async_url

STAGE: Final = "examples.money_transfer.stage"
STARTER: Final = "starter"
PLAY_SECONDS_MAX: Final = 45.0
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

    title: str
    makes = ""
    """What there is on servers for as long as it lives, for people."""
    services: ClassVar[Sequence[str]]
    """The processes that run all the time, beside the starter."""
    auditor: Auditor
    supervised = False
    """Whether a process that ends by itself is started again, as a supervisor does; else it is an error."""

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
                if not self.supervised:
                    raise child.failure("ended by itself")
                self.launch(name, faults.get(name))
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
        service = name.partition("-")[0]  # `giro-2` is one more process of `giro`
        role = "coordinator" if service == "coordinator" else "participant"
        return ["-m", "saga.cli", role, f"{self._stage}:{service}"]

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
    """Each with its log-in and its schema or database on one server, and a broker or the coordinator's database."""

    databases: ClassVar[type[Databases]]
    channels: ClassVar[type[Channels] | None] = None
    """None: the database is the broker."""
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
        parts = [part for part in (self.databases, self.channels) if part is not None]
        stack = "-".join(part.name for part in parts)
        self.title = f"{stack}: coordinator, two banks, notifier and starter as processes, " + (
            f"{self.databases.title} and {self.channels.title}"
            if self.channels
            else f"{self.databases.title} is the broker"
        )
        for part in parts:
            if part.variable not in os.environ:
                raise DemoError(f"{part.variable} is not set; `make demo STACK={stack}` sets it")

    def _make(self, stack: ExitStack) -> None:
        token = secrets.token_hex(4)
        name, namespace = f"saga_demo_{token}", f"demo-{token}"
        databases = self.databases(name, stack, database_each=self._database_each)
        self.makes = f"{databases.made} {name}*"
        urls = databases.make()
        for service, url in urls.items():
            tables, opening = self._tables.get(service, ()), self._opening.get(service, {})
            asyncio.run(prepare_service(url, SCHEMAS[service], tables, opening))
            self.environment[f"MONEY_TRANSFER_{service.upper()}_DATABASE"] = url
        if self.channels is None:
            broker = databases.queues(urls["coordinator"])
        else:
            self.environment["DEMO_NAMESPACE"] = namespace
            self.makes += f", {self.channels.made} saga.{namespace}.*"
            broker = self.channels(namespace, stack).make()
        self.environment["MONEY_TRANSFER_BROKER"] = broker
        self.auditor = databases.auditor()


class PostgresRabbitMq(Servers):
    databases, channels = OnPostgres, Queues


class PostgresKafka(Servers):
    databases, channels = OnPostgres, Topics


class PostgresAlone(Servers):
    databases = OnPostgres


class MariaDbRabbitMq(Servers):
    databases, channels = OnMariaDb, Queues


class MariaDbKafka(Servers):
    databases, channels = OnMariaDb, Topics


class MariaDbAlone(Servers):
    databases = OnMariaDb


LAYOUTS: Final[Mapping[str, type[Layout]]] = {
    "sqlite": Embedded,
    "sqlite-shared": SharedFile,
    "postgres": PostgresAlone,
    "postgres-rabbitmq": PostgresRabbitMq,
    "postgres-kafka": PostgresKafka,
    "mariadb": MariaDbAlone,
    "mariadb-rabbitmq": MariaDbRabbitMq,
    "mariadb-kafka": MariaDbKafka,
}

_ON_SERVERS: Final[Sequence[type[Servers]]] = tuple(
    layout for layout in LAYOUTS.values() if issubclass(layout, Servers)
)
_DATABASES: Final[Mapping[str, type[Databases]]] = {
    "postgresql": OnPostgres,
    "postgres": OnPostgres,
    "mariadb": OnMariaDb,
    "mysql": OnMariaDb,
}
_BROKERS: Final[Mapping[str, type[Channels]]] = {"amqp": Queues, "amqps": Queues, "kafka": Topics}


def on_servers(database: str, broker: str) -> type[Servers]:
    """Return the layout on servers that are there already; without a broker the database is one.

    Raises DemoError for addresses that are none; neither is shown, because they may hold passwords.
    """
    databases = _DATABASES.get(_scheme(database))
    if databases is None:
        raise DemoError(
            "the database's address must be of the form postgresql://user:password@host:port/name or mariadb://..."
        )
    os.environ[databases.variable] = database
    channels = None
    if broker not in ("", database, "database://"):
        channels = _BROKERS.get(_scheme(broker))
        if channels is None:
            raise DemoError(
                "the broker's address must be of the form amqp://user:password@host:port/ or kafka://host:port, "
                "or left out"
            )
        os.environ[channels.variable] = broker
    return next(each for each in _ON_SERVERS if (each.databases, each.channels) == (databases, channels))


def _scheme(url: str) -> str:
    """Return the scheme of an address without its driver; nothing if it is no address of a server."""
    try:
        parts = urlsplit(url)
        return parts.scheme.partition("+")[0] if parts.hostname and parts.port != 0 else ""
    except ValueError:  # its port is no number; it may be half of a password
        return ""


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
