"""What a benchmark runs on, and what each system gets of it: a database per process, and the broker's address."""

from __future__ import annotations

import importlib.metadata
import platform
import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final

from sqlalchemy import func, insert, select
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks import naive_database, tally, workloads
from benchmarks.brokers import Broker
from benchmarks.counters import Counts, server_pid
from devservices import Service
from examples.money_transfer import transfer
from saga.storage.sqlalchemy import schema
from saga.storage.sqlalchemy.database import async_url

ROLES: Final = ("coordinator", "participant")
NAIVE_TABLES: Final = naive_database.queue.metadata
_PACKAGES: Final = ("saga", "SQLAlchemy", "pydantic")


@dataclass
class Place:
    """Where one system of one cell lives."""

    name: str
    system: str
    urls: dict[str, str] = field(default_factory=dict)
    """Database address by role; none for participants without a database."""
    tallies: dict[str, str] = field(default_factory=dict)
    """By role the file in which the process counts its statements and commits; none where a server counts both."""


class Stack(ABC):
    """The database and the broker of one benchmark."""

    database: str
    broker: str
    description: str
    server_pids: Mapping[str, int]
    """The servers whose processor time can be seen from here."""
    versions: Mapping[str, str]
    tallies: Path | None = None
    """A folder for what the processes count by themselves, where a server does not count it."""

    @asynccontextmanager
    async def place(self, system: str, participants: str) -> AsyncIterator[Place]:
        """Make the databases of one system, and remove them and its queues afterwards."""
        place = Place(f"bench-{system}-{secrets.token_hex(3)}", system)
        try:
            for role in ROLES:
                if self.tallies is not None:
                    place.tallies[role] = tally.make(self.tallies / f"{place.name}-{role}.tally")
                if role == "coordinator" or participants != "stateless":
                    place.urls[role] = await self._make_database(place, role)
                    await _make_tables(place.urls[role], system, role)
            yield place
        finally:
            await self._remove(place)

    @abstractmethod
    async def _make_database(self, place: Place, role: str) -> str:
        """Return the address of an empty database."""

    @abstractmethod
    async def _remove(self, place: Place) -> None:
        """Remove databases and queues, also those of which only a part was made."""

    def broker_url(self, place: Place) -> str:
        """Return the broker's address: that of the coordinator's database unless there is a broker beside it."""
        return place.urls["coordinator"]

    @abstractmethod
    async def count(self, place: Place) -> dict[str, Counts]:
        """Return commits and statements so far, by role."""

    @abstractmethod
    async def settle(self) -> None:
        """Get work done that is due anyway, so that it does not fall into one system's run."""

    async def check_books(self, place: Place, workload: str, sagas: int) -> None:
        """Raise unless money is conserved and every saga moved it exactly once per step."""
        if "participant" not in place.urls:
            return
        engine = create_async_engine(place.urls["participant"])
        try:
            async with engine.connect() as connection:
                balance = await connection.scalar(select(func.sum(transfer.accounts.c.balance)))
                moves = await connection.scalar(select(func.count()).select_from(transfer.ledger))
        finally:
            await engine.dispose()
        wanted = sagas * sum(step != "notify" for step in workloads.STEPS[workload])
        if balance != workloads.ACCOUNTS * workloads.BALANCE or moves != wanted:
            raise RuntimeError(f"{place.name}: {balance} in the accounts, {moves} moves instead of {wanted}")


class ServerStack(Stack):
    """A database server, and a broker beside it or none."""

    package: ClassVar[str]
    """The database's driver."""

    def __init__(self, server: Service, broker: Broker | None) -> None:
        self._broker = broker
        self.broker = broker.name if broker else self.database
        servers = {self.database: server} | ({broker.name: broker.server} if broker else {})
        self.description = ", ".join(each.description for each in servers.values())
        self.server_pids = {
            name: pid for name, each in servers.items() if (pid := server_pid(each.url)) is not None
        }
        packages = [self.package, *([broker.package] if broker else [])]
        self.versions = versions(packages, {name: each.version for name, each in servers.items()})

    def broker_url(self, place: Place) -> str:
        return self._broker.server.url if self._broker else super().broker_url(place)

    async def _remove(self, place: Place) -> None:
        await self._remove_databases(place)
        if self._broker is not None:
            await self._broker.remove(place.name)

    @abstractmethod
    async def _remove_databases(self, place: Place) -> None:
        """Remove them with whoever logs in there, also those of which only a part was made."""

    @staticmethod
    def name_of(place: Place, role: str) -> str:
        """Return the name of a process's database, and of whoever logs in there."""
        return f"{place.name}-{role}".replace("-", "_")


async def _make_tables(url: str, system: str, role: str) -> None:
    engine = create_async_engine(async_url(url))
    try:
        async with engine.begin() as connection:
            if system == "saga":
                await connection.run_sync(schema.upgrade)
            elif role == "coordinator":
                await connection.run_sync(NAIVE_TABLES.create_all)
            if role == "participant":
                await connection.run_sync(transfer.metadata.create_all)
                rows = [
                    {"id": workloads.account(number), "balance": workloads.BALANCE}
                    for number in range(workloads.ACCOUNTS)
                ]
                await connection.execute(insert(transfer.accounts), rows)
    finally:
        await engine.dispose()


def versions(packages: Sequence[str], servers: Mapping[str, str]) -> dict[str, str]:
    """Return the versions of Python, of the packages that every stack has and of more, and of servers."""
    found = {name.lower(): importlib.metadata.version(name) for name in (*_PACKAGES, *packages)}
    return {"python": platform.python_version(), **found, **servers}
