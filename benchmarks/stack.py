"""The servers, and what each system gets of them: a database per process with a role of its own, and queue names."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import platform
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import aio_pika
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks import naive, naive_database, workloads
from benchmarks.counters import StatementCounter, server_pid
from devservices import Postgres, RabbitMq, start_postgres, start_rabbitmq
from examples.money_transfer import transfer
from saga.messages import commands_channel, parking_channel, replies_channel
from saga.storage.sqlalchemy import schema

ROLES: Final = ("coordinator", "participant")
NAIVE_TABLES: Final = naive_database.queue.metadata
_PACKAGES: Final = ("saga", "SQLAlchemy", "asyncpg", "aio-pika", "pydantic")


@dataclass
class Place:
    """Where one system of one cell lives."""

    name: str
    urls: dict[str, str] = field(default_factory=dict)
    """Database address by role; none for participants without a database."""
    database_roles: dict[str, str] = field(default_factory=dict)


class Stack:
    """PostgreSQL and RabbitMQ of one benchmark, or PostgreSQL alone, which is then the broker too."""

    def __init__(self, postgres: Postgres, rabbitmq: RabbitMq | None, counter: StatementCounter) -> None:
        self.postgres = postgres
        self.rabbitmq = rabbitmq
        self.counter = counter
        urls = {"postgresql": postgres.url} | ({"rabbitmq": rabbitmq.url} if rabbitmq else {})
        self.pids = {name: pid for name, url in urls.items() if (pid := server_pid(url)) is not None}
        self.versions = {
            "python": platform.python_version(),
            **{name.lower(): importlib.metadata.version(name) for name in _PACKAGES},
            "postgresql": postgres.version,
            **({"rabbitmq": rabbitmq.version} if rabbitmq else {}),
        }

    @asynccontextmanager
    async def place(self, system: str, participants: str) -> AsyncIterator[Place]:
        """Make the databases of one system, and remove them and its queues afterwards."""
        place = Place(f"bench-{system}-{secrets.token_hex(3)}")
        try:
            for role in ROLES:
                if role == "coordinator" or participants != "stateless":
                    await self._make_database(place, system, role)
            yield place
        finally:
            await self._remove(place)

    def broker(self, place: Place) -> str:
        """Return the broker's address: RabbitMQ's, or that of the coordinator's database."""
        return self.rabbitmq.url if self.rabbitmq else place.urls["coordinator"]

    async def _make_database(self, place: Place, system: str, role: str) -> None:
        name = f"{place.name}-{role}".replace("-", "_")
        _, password = await asyncio.to_thread(self.postgres.create_role, name)
        place.database_roles[role] = name
        await asyncio.to_thread(self.postgres.create_database, name, owner=name)
        place.urls[role] = self.postgres.database_url(name, role=name, password=password)
        engine = create_async_engine(place.urls[role])
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

    async def _remove(self, place: Place) -> None:
        for name in place.database_roles.values():
            await asyncio.to_thread(self.postgres.drop_database, name)
            await asyncio.to_thread(self.postgres.drop_role, name)
        if self.rabbitmq is None:
            return
        connection = await aio_pika.connect(self.rabbitmq.url, timeout=10)
        async with connection, connection.channel() as channel:
            for queue in _queues(place.name):
                await channel.queue_delete(queue)

    async def check_books(self, place: Place, workload: str, sagas: int) -> None:
        """Raise unless money is conserved and every saga moved it exactly once per step."""
        if "participant" not in place.urls:
            return
        url = self.postgres.database_url(place.database_roles["participant"])
        balance, moves = (
            await asyncio.to_thread(
                lambda: self.postgres.execute(
                    "SELECT (SELECT sum(balance) FROM account)::bigint, (SELECT count(*) FROM ledger)",
                    database_url=url,
                )
            )
        )[0][0]
        wanted = sagas * sum(step != "notify" for step in workloads.STEPS[workload])
        if balance != workloads.ACCOUNTS * workloads.BALANCE or moves != wanted:
            raise RuntimeError(f"{place.name}: {balance} in the accounts, {moves} moves instead of {wanted}")


def _queues(name: str) -> list[str]:
    services = set(naive.SERVICES.values())
    ours = [replies_channel(name), *(commands_channel(name, service) for service in services)]
    theirs = [f"{name}.{queue}" for queue in ("replies", *services)]
    return [*ours, *map(parking_channel, ours), *theirs]


@asynccontextmanager
async def start(name: str) -> AsyncIterator[Stack]:
    """Start the servers of a stack, or take those given in the environment. Raises Unavailable."""
    with contextlib.ExitStack() as servers:
        postgres = servers.enter_context(await asyncio.to_thread(start_postgres))
        rabbitmq = None
        if name == "postgres-rabbitmq":
            rabbitmq = servers.enter_context(await asyncio.to_thread(start_rabbitmq))
        counter = await StatementCounter.connect(postgres.url)
        try:
            yield Stack(postgres, rabbitmq, counter)
        finally:
            await counter.close()
